"""A kind of GPU and its machines, from a YAML profile: peaks, memory, links, and how much of them is achieved.

The achieved part of a matrix product of [m, k] and [k, n]: matmul / ((1 + half/m) (1 + half/n) (1 + half/k)). `matmul`
is that of very large matrices; a dimension as small as `half` (half_size) halves it. One number for all kernels is
coarse: it makes thin slices of a layer (much tensor parallelism, few tokens) slow, but not as slow as on a given GPU.
Hence `calibrated`. A message of n bytes takes latency + n / (link * bandwidth).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..console.errors import UserError
from .model import Gemm

__all__ = ["GPU", "Link", "beside_products", "known_gpus", "load_gpu", "peak_of"]

_PROFILES = Path(__file__).parent / "profiles"


class Link(NamedTuple):
    """The connection of one GPU, in one direction."""

    bytes_per_s: float  # achieved
    latency_s: float

    def all_gather_s(self, size: float, ranks: int) -> float:
        """Time of a ring that gathers `size` bytes in all; a reduce-scatter takes as long, an all-reduce twice that."""
        if ranks == 1 or not size:
            return 0.0
        return size * (ranks - 1) / ranks / self.bytes_per_s + math.log2(ranks) * self.latency_s


def peak_of(precision: str) -> str:
    """Return the peak that counts for the matrix products of the layers."""
    return "fp8" if precision == "fp8-params" else precision


def beside_products(precision: str) -> str:
    """Return the precision of attention and logits."""
    return "bf16" if precision.startswith("fp8") else precision


@dataclass(frozen=True)
class GPU:
    """A profile, in bytes, seconds and FLOP/s."""

    name: str
    precision: str
    peak_flops: dict[str, float]
    memory: float
    memory_bytes_per_s: float  # achieved
    gpus_per_node: int
    node_link: Link
    network_link: Link
    flash_attention: bool
    matmul: float
    half_size: float
    compute_capability: float

    def gemm_s(self, gemm: Gemm, precision: str) -> float:
        """Time of matrix products."""
        small = (1 + self.half_size / gemm.m) * (1 + self.half_size / gemm.n) * (1 + self.half_size / gemm.k)
        return gemm.flops * small / (self.matmul * self.peak_flops[peak_of(precision)])

    def has(self, precision: str) -> bool:
        """Return whether the profile has the peaks of that precision."""
        return {peak_of(precision), beside_products(precision)} <= set(self.peak_flops)

    def is_in_node(self, first: int, ranks: int, num_gpus: int) -> bool:
        """Return whether each group of `ranks` GPUs that are `first` apart in Megatron's numbering lies in one node.

        Groups fill the numbering from the start, so their span must divide a node: with 3 ranks on nodes of 8 the third
        group lies on two of them. The slowest group counts.
        """
        return num_gpus <= self.gpus_per_node or self.gpus_per_node % (first * ranks) == 0

    def link(self, first: int, ranks: int, num_gpus: int) -> Link:
        """Return the link of such a group. Over several nodes it is one ring, which has the network cards of all its
        members in a node at once.
        """
        if self.is_in_node(first, ranks, num_gpus):
            return self.node_link
        in_node = self.gpus_per_node // first if self.gpus_per_node % first == 0 else 0
        members = min(ranks, in_node) if in_node and ranks % in_node == 0 else 1
        bandwidth = min(self.node_link.bytes_per_s, self.network_link.bytes_per_s * members)
        return Link(bandwidth, self.network_link.latency_s)

    def crosses(self, apart: int, pp: int) -> list[bool]:
        """Return for each edge of the ring of pipeline ranks whether some of its messages leave the node.

        A pipeline rank is `apart` GPUs in a row (Megatron numbers the pipeline outermost), each the neighbour of the
        GPU `apart` on. Edge e is within a node where both ranks are; the last edge leads back to the first rank.
        """
        node = self.gpus_per_node
        inside = [edge * apart // node == ((edge + 2) * apart - 1) // node for edge in range(pp - 1)]
        return [not each for each in [*inside, pp * apart <= node]]

    def calibrated(self, measured_s: float, predict: "Callable[[GPU], float]") -> "GPU":
        """Return this GPU with the `matmul` that makes `predict` agree with one measured step.

        Raises UserError where no achieved part between 1% and 100% of the peak does.
        """
        lower, upper = 0.01, 1.0
        low, high = (predict(replace(self, matmul=value)) for value in (upper, lower))
        if not low <= measured_s <= high:
            raise UserError(
                f"--calibrate: a step of {measured_s:g} s cannot be explained: {low:.3g} s at the peak of {self.name},"
                f" {high:.3g} s at 1% of it.\n  Give the measured step of exactly this configuration."
            )
        for _ in range(25):
            middle = (lower * upper) ** 0.5
            lower, upper = (lower, middle) if predict(replace(self, matmul=middle)) < measured_s else (middle, upper)
        return replace(self, matmul=upper)


def known_gpus() -> list[str]:
    """Return the names of this package's profiles."""
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


def load_gpu(name: str) -> GPU:
    """Read a profile of this package by its name, or one of the user's by its path. Raises UserError for neither."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else _PROFILES / f"{name.lower()}.yaml"
    if not is_path and name.lower() not in known_gpus():
        known = ", ".join(known_gpus())
        raise UserError(f"--gpu {name} does not exist.\n  Use one of {known}, or a profile of yours: PATH.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # yaml lets through Python's own errors for a date or a number that does not exist, and for nesting too deep.
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--gpu {name} cannot be read: {reason}.") from None
    return _Reader(name, content).gpu()


_KEYS = (
    "name", "precision", "peak_tflops", "memory_gb", "memory_bandwidth_gb_s", "gpus_per_node", "node_link",
    "network_link", "compute_capability", "flash_attention", "achievable",
)  # fmt: skip
_DEFAULTS = {"compute_capability": 9.0}  # of Hopper


class _Reader:
    """Takes a profile apart. Raises UserError for a key too few, too many, or with an impossible value."""

    def __init__(self, name: str, content: Any):
        self.name, self.content = name, content

    def gpu(self) -> GPU:
        content = _DEFAULTS | self.content if isinstance(self.content, dict) else self.content
        top = self._map(content, "", _KEYS)
        keys = ("matmul", "memory", "link", "half_size")
        part = self._map(top["achievable"], "achievable", keys)
        achieved = {key: self._number(part, key, "achievable: ", 1.0) for key in keys[:3]}
        peaks = top["peak_tflops"] if isinstance(top["peak_tflops"], dict) else {}
        if top["precision"] not in peaks or not set(peaks) <= {"fp32", "fp16", "bf16", "fp8"}:
            wanted = f"a map of fp32, fp16, bf16, fp8, with one for {top['precision']}"
            raise UserError(f"--gpu {self.name}: peak_tflops is {wanted}.")
        return GPU(
            name=str(top["name"]),
            precision=str(top["precision"]),
            peak_flops={key: 1e12 * self._number(peaks, key, "peak_tflops: ") for key in peaks},
            memory=1e9 * self._number(top, "memory_gb"),
            memory_bytes_per_s=1e9 * achieved["memory"] * self._number(top, "memory_bandwidth_gb_s"),
            gpus_per_node=int(self._number(top, "gpus_per_node")),
            node_link=self._link(top, "node_link", achieved["link"]),
            network_link=self._link(top, "network_link", achieved["link"]),
            flash_attention=bool(top["flash_attention"]),
            matmul=achieved["matmul"],
            half_size=self._number(part, "half_size", "achievable: "),
            compute_capability=self._number(top, "compute_capability"),
        )

    def _link(self, top: dict[str, Any], key: str, achieved: float) -> Link:
        link = self._map(top[key], key, ("gb_s", "latency_us"))
        gb_s, latency_us = (self._number(link, each, f"{key}: ") for each in ("gb_s", "latency_us"))
        return Link(1e9 * achieved * gb_s, 1e-6 * latency_us)

    def _map(self, content: Any, place: str, keys: tuple[str, ...]) -> dict[str, Any]:
        where = f"--gpu {self.name}" + (f": {place}" if place else "")
        if not isinstance(content, dict):
            raise UserError(f"{where} is no map of {', '.join(keys)}.")
        for key in content:
            if key not in keys:
                raise UserError(f"{where}: unknown key {key!r}. Known are {', '.join(keys)}.")
        for key in keys:
            if key not in content:
                raise UserError(f"{where}: {key} is missing.")
        return content

    def _number(self, content: dict[str, Any], key: str, place: str = "", most: float = 1e9) -> float:
        value = content[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            wanted = f"a number above 0, at most {most:g}"
            raise UserError(f"--gpu {self.name}: {place}{key} is {value!r}; it must be {wanted}.")
        return float(value)

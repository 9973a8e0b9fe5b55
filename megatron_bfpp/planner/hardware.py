"""A kind of GPU and the machines it stands in, from a YAML profile: peaks, memory, links, and how much of them is achieved.

The achieved part of a matrix product of [m, k] and [k, n]: matmul / ((1 + half/m) (1 + half/n) (1 + half/k)). `matmul` is that
of very large matrices; a dimension as small as `half` (half_size) halves it. One number for all kernels is coarse: it says that
thin slices of a layer (much tensor parallelism, few tokens) are slow, not by how much on a given GPU. Hence `calibrated`.
A message of n bytes takes latency + n / (link * bandwidth).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from ..console.errors import UserError
from .model import Gemm

__all__ = ["GPU", "Link", "beside_products", "known_gpus", "load_gpu", "peak_of"]

_PROFILES = Path(__file__).parent / "profiles"


class Link(NamedTuple):
    """Of one GPU, in one direction."""

    bytes_per_s: float  # achieved
    latency_s: float

    def all_gather_s(self, size: float, ranks: int) -> float:
        """Of `size` bytes in all, over a ring; a reduce-scatter takes as long, an all-reduce twice that."""
        if ranks == 1 or not size:
            return 0.0
        return size * (ranks - 1) / ranks / self.bytes_per_s + math.log2(ranks) * self.latency_s


def peak_of(precision: str) -> str:
    """The peak that counts for the matrix products of the layers."""
    return "fp8" if precision == "fp8-params" else precision


def beside_products(precision: str) -> str:
    """What the rest computes in: attention and logits."""
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

    def gemm_s(self, gemm: Gemm, precision: str) -> float:
        small = (1 + self.half_size / gemm.m) * (1 + self.half_size / gemm.n) * (1 + self.half_size / gemm.k)
        return gemm.flops * small / (self.matmul * self.peak_flops[peak_of(precision)])

    def has(self, precision: str) -> bool:
        return peak_of(precision) in self.peak_flops and beside_products(precision) in self.peak_flops

    def is_in_node(self, first: int, ranks: int, num_gpus: int) -> bool:
        """Whether every group of `ranks` GPUs that stand `first` apart in Megatron's numbering has a node to itself or shares one.

        Groups fill the numbering from the start, so their span must divide a node: with 3 ranks on nodes of 8 the third group
        lies on two of them. The slowest group counts.
        """
        return num_gpus <= self.gpus_per_node or self.gpus_per_node % (first * ranks) == 0

    def link(self, first: int, ranks: int, num_gpus: int) -> Link:
        """Between such GPUs. A group over several nodes runs as one ring. It has the network cards of all its members in a node at once."""
        if self.is_in_node(first, ranks, num_gpus):
            return self.node_link
        is_aligned = self.gpus_per_node % first == 0
        members = (
            min(ranks, self.gpus_per_node // first) if is_aligned and ranks % (self.gpus_per_node // first) == 0 else 1
        )
        bandwidth = min(self.node_link.bytes_per_s, self.network_link.bytes_per_s * members)
        return Link(bandwidth, self.network_link.latency_s)

    def crosses(self, apart: int, pp: int) -> list[bool]:
        """Of each edge of the ring of pipeline ranks, whether some of its messages leave the node.

        A pipeline rank is `apart` GPUs in a row (Megatron numbers the pipeline outermost), each the neighbour of the GPU `apart` on.
        Edge e is within a node where both ranks are; the last edge leads back to the first rank.
        """
        node = self.gpus_per_node
        inside = [edge * apart // node == ((edge + 2) * apart - 1) // node for edge in range(pp - 1)]
        return [not each for each in [*inside, pp * apart <= node]]

    def calibrated(self, measured_s: float, predict: Callable[[GPU], float]) -> GPU:
        """The same with the `matmul` that makes `predict` agree with one measured step.

        Raises UserError where no achieved part between 1% and 100% of the peak does.
        """
        slow, fast = (replace(self, matmul=value) for value in (0.01, 1.0))
        low, high = predict(fast), predict(slow)
        if not low <= measured_s <= high:
            raise UserError(
                f"--calibrate: a step of {measured_s:g} s cannot be explained: {low:.3g} s at the peak of {self.name},"
                f" {high:.3g} s at 1% of it.\n  Give the measured step of exactly this configuration."
            )
        lower, upper = 0.01, 1.0
        for _ in range(25):
            middle = (lower * upper) ** 0.5
            lower, upper = (lower, middle) if predict(replace(self, matmul=middle)) < measured_s else (middle, upper)
        return replace(self, matmul=upper)


def known_gpus() -> list[str]:
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


def load_gpu(name: str) -> GPU:
    """A profile of this package by its name, or one of the user's by its path. UserError for what is neither."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _PROFILES / f"{name.lower()}.yaml"
    if not name.endswith((".yaml", ".yml")) and name.lower() not in known_gpus():
        raise UserError(
            f"--gpu {name} does not exist.\n  Use one of {', '.join(known_gpus())}, or a profile of yours: PATH.yaml."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # yaml also lets through what Python says to a date or a number that cannot be, and to a nest too deep.
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--gpu {name} cannot be read: {reason}.") from None
    return _Reader(name, content).gpu()


class _Reader:
    """Takes a profile apart; UserError for a key too few, too many, or with a value that cannot be."""

    def __init__(self, name: str, content: Any):
        self.name, self.content = name, content

    def gpu(self) -> GPU:
        top = self._map(self.content, "", ("name", "precision", "peak_tflops", "memory_gb", "memory_bandwidth_gb_s", "gpus_per_node",
                                           "node_link", "network_link", "flash_attention", "achievable"))  # fmt: skip
        part = self._map(top["achievable"], "achievable", ("matmul", "half_size", "memory", "link"))
        matmul, memory, link = (
            self._number(part[key], f"achievable: {key}", 1.0) for key in ("matmul", "memory", "link")
        )
        peaks = top["peak_tflops"] if isinstance(top["peak_tflops"], dict) else {}
        if top["precision"] not in peaks or not set(peaks) <= {"fp32", "fp16", "bf16", "fp8"}:
            raise UserError(
                f"--gpu {self.name}: peak_tflops is a map of fp32, fp16, bf16, fp8, with one for {top['precision']}."
            )
        return GPU(
            name=str(top["name"]),
            precision=str(top["precision"]),
            peak_flops={key: 1e12 * self._number(value, f"peak_tflops: {key}") for key, value in peaks.items()},
            memory=1e9 * self._number(top["memory_gb"], "memory_gb"),
            memory_bytes_per_s=1e9 * memory * self._number(top["memory_bandwidth_gb_s"], "memory_bandwidth_gb_s"),
            gpus_per_node=int(self._number(top["gpus_per_node"], "gpus_per_node")),
            node_link=self._link(top["node_link"], "node_link", link),
            network_link=self._link(top["network_link"], "network_link", link),
            flash_attention=bool(top["flash_attention"]),
            matmul=matmul,
            half_size=self._number(part["half_size"], "achievable: half_size"),
        )

    def _link(self, content: Any, key: str, achieved: float) -> Link:
        link = self._map(content, key, ("gb_s", "latency_us"))
        latency_us = self._number(link["latency_us"], f"{key}: latency_us")
        return Link(1e9 * achieved * self._number(link["gb_s"], f"{key}: gb_s"), 1e-6 * latency_us)

    def _map(self, content: Any, place: str, keys: tuple[str, ...]) -> dict[str, Any]:
        where = f"--gpu {self.name}" + (f": {place}" if place else "")
        if not isinstance(content, dict):
            raise UserError(f"{where} is no map of {', '.join(keys)}.")
        for key in content:
            if key not in keys:
                raise UserError(f"{where}: unknown key {key!r}. Known are {', '.join(keys)}.")
        missing = [key for key in keys if key not in content]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing.")
        return content

    def _number(self, value: Any, key: str, most: float = 1e9) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise UserError(f"--gpu {self.name}: {key} is {value!r}; it must be a number above 0, at most {most:g}.")
        return float(value)

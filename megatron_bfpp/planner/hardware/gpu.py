"""A kind of GPU and its machines: peaks, memory, links, and how much of them is achieved.

The achieved part of a matrix product of [m, k] and [k, n]: matmul / ((1 + half/m) (1 + half/n) (1 + half/k)). `matmul`
is that of very large matrices, matmul_fp8 the same in fp8; a dimension as small as `half` (half_size) halves it. One
number for all kernels is coarse: it makes thin slices of a layer (much tensor parallelism, few tokens) slow, but not as
slow as on a given GPU. Hence `calibrated`. A flash attention achieves `attention` of the 16-bit peak. The forward of
a layer with experts takes at least experts_s, its backward twice that: its many small kernels wait for the host. A
message of n bytes takes latency + n / (link * bandwidth).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...console.errors import UserError
from ..model import Gemm

__all__ = ["GPU", "Link", "beside_products", "peak_of"]

# A flash attention's backward makes the scores again and has four products more: five for two, arXiv:2307.08691.
FLASH_BACKWARD = 2.5


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
    matmul_fp8: float
    attention: float
    experts_s: float

    def gemm_s(self, gemm: Gemm, precision: str) -> float:
        """Time of matrix products."""
        small = (1 + self.half_size / gemm.m) * (1 + self.half_size / gemm.n) * (1 + self.half_size / gemm.k)
        peak = peak_of(precision)
        return gemm.flops * small / ((self.matmul_fp8 if peak == "fp8" else self.matmul) * self.peak_flops[peak])

    def square_s(self, square: Iterable[Gemm], precision: str) -> tuple[float, float]:
        """Time of the products between positions, forward and backward, for gemms over the whole square.

        A flash attention skips the half of the square that a causal mask hides.
        """
        if not self.flash_attention:
            forward = sum(self.gemm_s(gemm, precision) for gemm in square)
            return forward, 2 * forward
        peak = self.attention * self.peak_flops[precision]
        forward = sum(gemm.flops for gemm in square) / 2 / peak
        return forward, FLASH_BACKWARD * forward

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
        members = self.in_node(first, ranks, num_gpus)
        if members == ranks:
            return self.node_link
        bandwidth = min(self.node_link.bytes_per_s, self.network_link.bytes_per_s * members)
        return Link(bandwidth, self.network_link.latency_s)

    def in_node(self, first: int, ranks: int, num_gpus: int) -> int:
        """Return how many members of such a group stand in one node, in the slowest group."""
        if self.is_in_node(first, ranks, num_gpus):
            return ranks
        in_node = self.gpus_per_node // first if self.gpus_per_node % first == 0 else 0
        return min(ranks, in_node) if in_node and ranks % in_node == 0 else 1

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

        What fp8 and attention achieve is changed by the same factor. Raises UserError where no achieved part between 1%
        and 100% of the peak does.
        """
        lower, upper = 0.01, 1.0
        low, high = (predict(self.achieving(value)) for value in (upper, lower))
        if not low <= measured_s <= high:
            raise UserError(
                f"--calibrate: a step of {measured_s:g} s cannot be explained: {low:.3g} s at the peak of {self.name},"
                f" {high:.3g} s at 1% of it.\n  Give the measured step of exactly this configuration."
            )
        for _ in range(25):
            middle = (lower * upper) ** 0.5
            lower, upper = (lower, middle) if predict(self.achieving(middle)) < measured_s else (middle, upper)
        return self.achieving(upper)

    def with_parts(self, parts: Mapping[str, float]) -> "GPU":
        """Return this GPU with other achieved parts, by the names of its fields."""
        return replace(self, **dict[str, Any](parts))

    def achieving(self, matmul: float) -> "GPU":
        """Return this GPU with another `matmul`, and with the other achieved parts of a peak changed alike."""
        factor = matmul / self.matmul
        others = {name: min(1.0, factor * getattr(self, name)) for name in ("matmul_fp8", "attention")}
        return self.with_parts({"matmul": matmul, **others})

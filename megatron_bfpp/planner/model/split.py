"""How the ranks share one layer, and the matrix products of a rank."""

from typing import NamedTuple

__all__ = ["Gemm", "Split"]


class Split(NamedTuple):
    """The ranks that share a layer, in the words of Megatron's flags."""

    tp: int = 1  # heads, and the width of a dense MLP
    cp: int = 1  # the positions of a sequence
    ep: int = 1  # the experts
    etp: int = 1  # the width of an expert


class Gemm(NamedTuple):
    """`products` products of [m, k] and [k, n] matrices."""

    m: int
    n: int
    k: int
    products: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.products

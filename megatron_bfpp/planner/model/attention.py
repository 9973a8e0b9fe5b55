"""Attention as Megatron builds it: with heads of queries in groups, or with latent keys and values (MLA).

Every block of a layer (these, and those of mlp.py and recurrent.py) answers the same questions:
    parameters(tp)         on one tensor-parallel rank, without the norm before the block
    expert_parameters(...) those that are split by experts instead
    gemms(tokens, split)   the forward's products with weights on one rank, which has so many tokens
    square(...)            those between positions, over the whole square
    operations(s)          multiplications and additions of a token in a forward, as
                           megatron.training.training.num_floating_point_operations counts them
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .split import Gemm, Split

__all__ = ["Attention", "Block", "LatentAttention"]


@dataclass(frozen=True)
class Block(ABC):
    """What is not said otherwise: no experts, no products between positions."""

    hidden: int

    @abstractmethod
    def parameters(self, tp: int) -> int: ...

    def expert_parameters(self, split: Split) -> int:
        return 0

    @abstractmethod
    def gemms(self, tokens: int, split: Split) -> list[Gemm]: ...

    def square(self, sequences: int, length: int, split: Split) -> list[Gemm]:
        return []

    @abstractmethod
    def operations(self, length: int) -> float: ...


@dataclass(frozen=True)
class Attention(Block):
    """Heads of queries that share the keys and values of their group."""

    heads: int
    groups: int  # heads of keys and values
    width: int  # of a head
    bias: bool = True  # of both linear layers
    qkv_bias: bool = False  # where `bias` is False
    norm: int = 0  # parameters of a norm of each query's and key's head, per element of it; 0: no such norm
    is_gated: bool = False  # the output is gated by one more projection of its width
    has_sink: bool = False  # a learned offset of each head's softmax

    @property
    def query_width(self) -> int:
        return self.width * self.heads

    @property
    def qkv_width(self) -> int:
        return self.query_width * (2 if self.is_gated else 1) + 2 * self.width * self.groups

    def parameters(self, tp: int) -> int:
        count = self.hidden * (self.qkv_width + self.query_width) // tp
        # The bias of a column-parallel layer is split like its output, that of a row-parallel layer is whole.
        count += self.qkv_width // tp if self.bias or self.qkv_bias else 0
        count += self.hidden if self.bias else 0
        count += self.heads // tp if self.has_sink else 0
        return count + 2 * self.width * self.norm

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        tp = split.tp
        return [Gemm(tokens, self.qkv_width // tp, self.hidden), Gemm(tokens, self.hidden, self.query_width // tp)]

    def square(self, sequences: int, length: int, split: Split) -> list[Gemm]:
        heads, own = sequences * self.heads // split.tp, length // split.cp
        return [Gemm(own, length, self.width, heads), Gemm(own, self.width, length, heads)]

    def operations(self, length: int) -> float:
        return 2.0 * (self.hidden * (self.qkv_width + self.query_width) + self.query_width * length)


@dataclass(frozen=True)
class LatentAttention(Block):
    """Keys and values from a latent vector of each token; queries too where `query_rank` is not 0.

    Source: DeepSeek-V2, arXiv:2405.04434, as megatron.core.transformer.multi_latent_attention builds it.
    """

    heads: int
    query_rank: int
    rank: int  # of the latent keys and values
    width: int  # of a head of queries and keys, without its rotated part
    rotated: int  # the rotated part, which all heads of keys share
    value_width: int
    bias: bool = True  # of the output's linear layer
    norm: int = 0  # parameters of the norms of both latent vectors, per element; 0: no such norms
    is_down_split: bool = False  # tensor parallelism splits the projections to the latents, as Megatron's own layers do

    @property
    def query_width(self) -> int:
        return self.heads * (self.width + self.rotated)

    @property
    def output_width(self) -> int:
        return self.heads * self.value_width

    @property
    def up_width(self) -> int:
        """Width of keys and values, as they come from the latent vector."""
        return self.heads * (self.width + self.value_width)

    def _linear(self, split: Split) -> list[tuple[int, int]]:
        """Return (output, input) of each linear layer on one rank."""
        tp, down = split.tp, split.tp if self.is_down_split else 1
        queries = [(self.query_width // tp, self.hidden)]
        if self.query_rank:
            queries = [(self.query_rank // down, self.hidden), (self.query_width // tp, self.query_rank)]
        keys = [((self.rank + self.rotated) // down, self.hidden), (self.up_width // tp, self.rank)]
        return [*queries, *keys, (self.hidden, self.output_width // tp)]

    def parameters(self, tp: int) -> int:
        matrices = sum(output * inner for output, inner in self._linear(Split(tp)))
        return matrices + self.norm * (self.query_rank + self.rank) + (self.hidden if self.bias else 0)

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        return [Gemm(tokens, output, inner) for output, inner in self._linear(split)]

    def square(self, sequences: int, length: int, split: Split) -> list[Gemm]:
        heads, own = sequences * self.heads // split.tp, length // split.cp
        return [Gemm(own, length, self.width + self.rotated, heads), Gemm(own, self.value_width, length, heads)]

    def operations(self, length: int) -> float:
        linear = sum(output * inner for output, inner in self._linear(Split()))
        norms = self.query_rank + self.rank
        return 2.0 * (linear + norms) + length * (self.query_width + self.output_width)

"""Layers that carry a state from position to position instead of an attention: Mamba-2, and gated delta nets."""

from dataclasses import dataclass

from .attention import Block
from .split import Gemm, Split

__all__ = ["GatedDelta", "Mamba"]


@dataclass(frozen=True)
class Mamba(Block):
    """megatron.core.ssm.mamba_mixer: one projection in, a short convolution, the scan, a gated norm, one out."""

    heads: int
    width: int = 64  # of a head
    state: int = 128
    groups: int = 8
    convolution: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def projected(self) -> int:
        """Width of the projection in: gate, input, B, C and step of each head."""
        return 2 * self.inner + 2 * self.groups * self.state + self.heads

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def parameters(self, tp: int) -> int:
        whole = self.hidden * (self.projected + self.inner) + self.convolved * (self.convolution + 1)
        return (whole + 3 * self.heads + self.inner) // tp  # A, D and the step's bias of a head; the norm

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        tp = split.tp
        return [Gemm(tokens, self.projected // tp, self.hidden), Gemm(tokens, self.hidden, self.inner // tp)]

    def operations(self, length: int) -> float:
        # Megatron counts an inner width of 2 hidden, whatever the heads are.
        inner = 2 * self.hidden
        projected = 2 * inner + 2 * self.groups * self.state + self.heads
        return 2.0 * self.hidden * (projected + inner) + 7.0 * inner * self.state


@dataclass(frozen=True)
class GatedDelta(Block):
    """megatron.core.ssm.gated_delta_net, the linear attention of Qwen3-Next."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    convolution: int = 4
    norm: int = 1  # parameters of the output's norm, per element of a head

    @property
    def inner(self) -> int:
        return self.value_heads * self.value_width

    @property
    def convolved(self) -> int:
        return 2 * self.key_heads * self.key_width + self.inner

    @property
    def projected(self) -> int:
        """Width of the projection in: queries, keys, values, their gate, and two numbers of each value head."""
        return self.convolved + self.inner + 2 * self.value_heads

    def parameters(self, tp: int) -> int:
        whole = self.hidden * (self.projected + self.inner) + self.convolved * self.convolution + 2 * self.value_heads
        return whole // tp + self.norm * self.value_width

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        tp = split.tp
        return [Gemm(tokens, self.projected // tp, self.hidden), Gemm(tokens, self.hidden, self.inner // tp)]

    def operations(self, length: int) -> float:
        rule = 4 * self.value_heads * self.value_width**2
        return 2.0 * (self.hidden * (self.projected + self.inner) + self.convolution * self.convolved + rule)

"""A layer: its blocks, each behind a norm; and a layer that predicts one more token (MTP)."""

from dataclasses import dataclass

from .attention import Block
from .split import Gemm, Split

__all__ = ["Layer", "Prediction"]


@dataclass(frozen=True)
class Layer:
    """Blocks in order, each with a norm before it. A layer of a hybrid model has one block, else two."""

    hidden: int
    blocks: tuple[Block, ...]
    norm: int = 1  # parameters of a norm, per element
    is_fp8: bool = True  # where the job uses fp8: --first-last-layers-bf16 leaves some out

    def parameters(self, tp: int = 1) -> int:
        """Count those that data parallelism replicates."""
        return sum(block.parameters(tp) + self.norm * self.hidden for block in self.blocks)

    def expert_parameters(self, split: Split) -> int:
        """Count those of the experts, which fewer data-parallel ranks replicate."""
        return sum(block.expert_parameters(split) for block in self.blocks)

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        return [gemm for block in self.blocks for gemm in block.gemms(tokens, split)]

    def square(self, sequences: int, length: int, split: Split) -> list[Gemm]:
        return [gemm for block in self.blocks for gemm in block.square(sequences, length, split)]

    def operations(self, length: int) -> float:
        return sum(block.operations(length) for block in self.blocks)


@dataclass(frozen=True)
class Prediction(Layer):
    """A layer of megatron.core.transformer.multi_token_prediction: a projection of the hidden state beside the next
    token's embedding, one or several layers, and a norm.
    """

    def parameters(self, tp: int = 1) -> int:
        return super().parameters(tp) + 2 * self.hidden * self.hidden // tp + 3 * self.norm * self.hidden

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        return [Gemm(tokens, self.hidden // split.tp, 2 * self.hidden), *super().gemms(tokens, split)]

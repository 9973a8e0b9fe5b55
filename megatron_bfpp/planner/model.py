"""A dense GPT as Megatron builds it: its parameters on a tensor-parallel rank, and its floating-point operations.

Sizes are counted in parameters, operations in FLOPs (a multiplication and an addition are two).
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from ..console.errors import UserError
from ..schedule.costs import Times, times_of

__all__ = ["GPT", "Gemm"]


class Gemm(NamedTuple):
    """`products` products of [m, k] and [k, n] matrices."""

    m: int
    n: int
    k: int
    products: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.products


@dataclass(frozen=True)
class GPT:
    """The sizes of a model, in the words of Megatron's flags."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    ffn_hidden_size: int = 0  # 0: Megatron's default, 4 x hidden, or 2/3 of that for SwiGLU
    num_query_groups: int = 0  # heads of keys and values; 0: as many as heads
    kv_channels: int = 0  # width of a head; 0: hidden / heads
    max_position_embeddings: int = 0  # 0: the sequence length
    make_vocab_size_divisible_by: int = 128
    swiglu: bool = False
    untied: bool = False
    rms_norm: bool = False
    linear_bias: bool = True
    qkv_bias: bool = False  # where linear_bias is False
    qk_layernorm: bool = False
    learned_positions: bool = True  # False: rotary
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        heads = self.num_attention_heads
        if not self.kv_channels and self.hidden_size % heads:
            raise UserError(f"--hidden-size {self.hidden_size} is no multiple of --num-attention-heads {heads}.\n"
                            "  Change one of them, or give the width of a head with --kv-channels.")  # fmt: skip
        if heads % self.groups:
            raise UserError(f"--num-attention-heads {heads} is no multiple of --num-query-groups {self.groups}.")

    # The zeros above are filled in as validate_args of megatron.training.arguments does.

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def query_width(self) -> int:
        return self.head_width * self.num_attention_heads

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.head_width * self.groups

    @property
    def fc1_width(self) -> int:
        return self.ffn * (2 if self.swiglu else 1)

    def padded_vocab(self, tp: int) -> int:
        """Pad the vocabulary as megatron.training.vocab_utils.calculate_padded_vocab_size does."""
        multiple = self.make_vocab_size_divisible_by * tp
        return -(-self.vocab_size // multiple) * multiple

    # Parameters of one tensor-parallel rank

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (1 if self.rms_norm else 2)

    def layer_parameters(self, tp: int = 1) -> int:
        """Count the parameters of one layer."""
        h = self.hidden_size
        matrices = h * (self.qkv_width + self.query_width + self.fc1_width + self.ffn) // tp
        # Biases of column-parallel layers are split like their outputs, those of row-parallel layers are whole.
        biases = (self.qkv_width + self.fc1_width) // tp + 2 * h if self.linear_bias else 0
        if self.qkv_bias and not self.linear_bias:
            biases = self.qkv_width // tp
        norms = 2 * self._norm_parameters
        if self.qk_layernorm:
            norms += 2 * self.head_width * (1 if self.rms_norm else 2)
        return matrices + biases + norms

    def embedding_parameters(self, tp: int = 1) -> int:
        """Count the parameters before the first layer. Positions are whole on every rank."""
        words = self.padded_vocab(tp) // tp * self.hidden_size
        positions = (self.max_position_embeddings or self.seq_length) * self.hidden_size
        return words + (positions if self.learned_positions else 0)

    def head_parameters(self, tp: int = 1, alone: bool = False) -> int:
        """Count the parameters after the last layer: final norm and output matrix.

        alone: on one rank with the embedding, which is the matrix if the two are tied.
        """
        has_matrix = self.untied or not alone
        return self._norm_parameters + (self.padded_vocab(tp) // tp * self.hidden_size if has_matrix else 0)

    @property
    def parameters(self) -> int:
        """Count the parameters of the whole model, a tied embedding once."""
        ends = self.embedding_parameters() + self.head_parameters(alone=True)
        return self.num_layers * self.layer_parameters() + ends

    # Operations

    def layer_gemms(self, micro_batch: int, tp: int) -> list[Gemm]:
        """Return the matrix products of a layer's forward on one rank, without those of `attention_gemms`."""
        tokens, h = micro_batch * self.seq_length, self.hidden_size
        return [
            Gemm(tokens, self.qkv_width // tp, h),
            Gemm(tokens, h, self.query_width // tp),
            Gemm(tokens, self.fc1_width // tp, h),
            Gemm(tokens, h, self.ffn // tp),
        ]

    def attention_gemms(self, micro_batch: int, tp: int) -> list[Gemm]:
        """Return queries times keys, and probabilities times values, over the whole square of positions."""
        s, heads = self.seq_length, micro_batch * self.num_attention_heads // tp
        return [Gemm(s, s, self.head_width, heads), Gemm(s, self.head_width, s, heads)]

    def head_gemm(self, micro_batch: int, tp: int) -> Gemm:
        """Return the product that makes the logits."""
        return Gemm(micro_batch * self.seq_length, self.padded_vocab(tp) // tp, self.hidden_size)

    def times(self, recompute: str) -> Times:
        """Return f, i and w as the plugin estimates them where it chooses how many micro-batches await their W."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "seq_length", "num_attention_heads", "swiglu")}
        return times_of(SimpleNamespace(
            **sizes, ffn_hidden_size=self.ffn, kv_channels=self.head_width, num_query_groups=self.groups,
            group_query_attention=True, recompute_granularity=recompute,
        ))  # fmt: skip

    def flops(self, sequences: int) -> float:
        """Count the operations of a step as megatron.training.training.num_floating_point_operations does.

        Forward and backward (3 x forward), half of the attention's square (causal mask), no recomputation.
        """
        h, s = self.hidden_size, self.seq_length
        per_token = h * (self.qkv_width + self.query_width + self.fc1_width + self.ffn) + self.query_width * s
        return 6.0 * sequences * s * (self.num_layers * per_token + h * self.padded_vocab(1))

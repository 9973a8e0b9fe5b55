"""What each block of a layer leaves for its backward, by the word with which Megatron recomputes that part.

The words are those of --recompute-modules; "" is what only full recomputation saves. Elements, not bytes, each with the
kind of its bytes: `element` as activations are stored, `linear` as matrix products save their inputs (a byte in fp8).
Splits: by tensor parallelism what is as wide as heads or an MLP (`wide`), by sequence parallelism what is as wide as
the hidden state (`narrow`). With tokens per rank and h, that is tokens / tp and tokens / (tp or 1).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..model import MLP, Attention, Experts, GatedDelta, LatentAttention, Mamba
from ..model.attention import Block

__all__ = ["Kept", "Tokens", "kept_by"]

# Bytes that a router keeps of each expert for a token: its score in fp32, and where it stands in the order of experts;
# and of each copy of a token: three numbers of 8 bytes.
ROUTED, PERMUTED = 12, 24
BLOCK = 64  # positions of a block of the gated delta rule


class Kept(NamedTuple):
    """A tensor that is kept."""

    word: str
    size: float  # bytes


@dataclass(frozen=True)
class Tokens:
    """The tokens of one micro-batch on a rank, and the bytes of an element of them."""

    length: int  # positions of a whole sequence
    whole: float  # tokens of the rank, where tensor parallelism does not split the sequence
    tp: int
    etp: int
    is_split: bool  # by sequence parallelism
    element: int
    linear: int
    has_flash: bool
    attention_dropout: float
    is_rotary: bool
    norm: int  # bytes of an element that a norm saves

    @property
    def narrow(self) -> float:
        return self.whole / self.tp if self.is_split else self.whole

    @property
    def wide(self) -> float:
        return self.whole / self.tp


def kept_by(block: Block, t: Tokens) -> Iterator[Kept]:
    """Yield what a block keeps, without the norm before it and the dropout behind it."""
    match block:
        case Attention():
            yield from _attention(block, t)
        case LatentAttention():
            yield from _latent(block, t)
        case MLP():
            yield from _mlp(block, t, "mlp")
        case Experts():
            yield from _experts(block, t)
        case Mamba():
            yield from _mamba(block, t)
        case GatedDelta():
            yield from _delta(block, t)
        case _:
            raise AssertionError(f"{block} is no kind of block")


def _output(t: Tokens, width: float) -> Kept:
    """The attention's output, which its last product keeps; in fp8 the attention keeps its own."""
    return Kept("", t.wide * width * (t.linear + (0 if t.linear == t.element else t.element)))


def _square(t: Tokens, heads: int) -> Iterator[Kept]:
    """The probabilities, with dropout a second copy and a mask; a flash kernel makes them again."""
    if not t.has_flash:
        each = 2 * t.element + 1 if t.attention_dropout else t.element
        yield Kept("core_attn", t.wide * t.length * heads * each)


def _attention(a: Attention, t: Tokens) -> Iterator[Kept]:
    keys = 2 * a.width * a.groups
    if not t.has_flash and a.groups < a.heads:
        kept = 3 * a.query_width  # keys and values repeated for each head; the projection's output is freed
    else:
        # Rotation and norms copy queries and keys; the values stay a view of the projection's output, and so keep it.
        kept = a.qkv_width + (a.query_width + keys // 2 if t.is_rotary or a.norm else 0)
    yield Kept("", t.wide * t.element * kept)
    if a.norm:  # what the norms save is a copy: queries and keys are slices of the projection's output
        yield Kept("", t.wide * t.norm * (a.query_width + keys // 2))
    if a.is_gated:  # the gate in fp32, and the attention's output before it
        yield Kept("", t.wide * a.query_width * (4 + t.element))
    yield from _square(t, a.heads)
    yield _output(t, a.query_width)


def _latent(a: LatentAttention, t: Tokens) -> Iterator[Kept]:
    ranks = a.query_rank + a.rank
    # The latent vectors, which the products behind them keep, and their norms before them.
    yield Kept("", t.narrow * ranks * (t.linear + (t.norm if a.norm else 0)))
    # Each head has the rotated part of the keys as its own copy.
    yield Kept("mla_up_proj", t.wide * t.element * (2 * a.query_width + a.output_width))
    yield from _square(t, a.heads)
    yield _output(t, a.output_width)


def _mlp(m: MLP, t: Tokens, word: str) -> Iterator[Kept]:
    """Output of the first layer, which the activation function keeps, and input of the second."""
    yield Kept(word, t.wide * m.fc1_width * t.element)
    yield Kept(word, t.wide * m.ffn * t.linear)


def _experts(e: Experts, t: Tokens) -> Iterator[Kept]:
    copies = t.narrow * e.chosen
    yield Kept("moe", t.narrow * e.count * ROUTED + copies * PERMUTED)
    if e.latent:
        yield Kept("moe", t.narrow * (e.latent * t.linear + e.latent * t.linear))
    yield Kept("moe", copies * t.etp * e.width * t.linear)
    yield Kept("moe", copies * e.expert.fc1_width * t.element)
    yield Kept("moe_act", copies * e.ffn * t.linear)
    if e.shared is not None:
        yield from _mlp(e.shared, t, "shared_experts")


def _mamba(m: Mamba, t: Tokens) -> Iterator[Kept]:
    """What the fused kernel takes, the scan's output before and behind its gate, and its norm's output.

    mamba_ssm's MambaSplitConv1dScanCombinedFn makes the convolution and the states of its chunks again.
    """
    yield Kept("", t.wide * t.element * (m.projected + 2 * m.inner))
    yield Kept("", t.wide * t.linear * m.inner)


def _delta(d: GatedDelta, t: Tokens) -> Iterator[Kept]:
    """The projection, queries and keys before their norm and repeated for the heads of values, the values, the gate,
    the rule's output; beta, the decay in fp32, and a row of the rule's blocks of each head.

    fla's chunk_gated_delta_rule keeps what it takes and the inverses of its blocks; it makes the states again.
    """
    heads, queries = d.value_heads, d.key_heads * d.key_width
    repeated = heads * d.key_width
    kept = d.projected + 2 * queries + 2 * repeated + 3 * d.inner + heads * (1 + BLOCK)
    yield Kept("", t.wide * (t.element * kept + 4 * heads))
    yield Kept("gdn_norm_out", t.wide * t.linear * d.inner)

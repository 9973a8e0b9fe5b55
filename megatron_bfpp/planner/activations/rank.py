"""Bytes that a forward leaves for its backward, on one rank, per layer and micro-batch.

They are the tensors that autograd saves, each storage once, as Megatron's layers with fused norms and SwiGLU save them,
without the norms' statistics (8 bytes a token); and what an owed gradient of a layer's weights keeps of them. With s
positions, b sequences, h hidden, t tensor-parallel ranks and e bytes an element:
    split by t only with sequence parallelism: inputs and outputs of the norms (4 s b h e), dropout masks, what experts
        take
    always split by t: queries, keys and values; the attention's output; input and output of the activation function
    attention without a flash kernel: its probabilities, s^2 b heads e / t, and with dropout a second copy and a mask
    context parallelism divides the positions of all of them
Source of the method: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198; the numbers are counted from the code and tested against torch's saved-tensor hooks.
"""

from dataclasses import dataclass, field

from ..model import GPT, Layer, Prediction, Split
from .blocks import Tokens, kept_by

__all__ = ["Activations"]

CORE = ("core_attn",)  # what Megatron's selective recomputation is without --recompute-modules


@dataclass(frozen=True)
class Activations:
    """The activations of one micro-batch, in bytes."""

    gpt: GPT = field(hash=False)  # a search asks for the same sizes of one model again and again
    micro_batch: int
    tp: int
    sequence_parallel: bool
    element: int  # bytes
    flash_attention: bool  # False: the probabilities are stored, as by Megatron's local layers
    linear: int = 0  # bytes an element of the inputs that matrix products save; 0: `element`
    fused_rms_norm: bool = True  # False: torch's on a CPU, which saves its input and its result before scaling in fp32
    cp: int = 1
    ep: int = 1
    etp: int = 1
    modules: tuple[str, ...] = CORE  # what selective recomputation makes again

    @property
    def _tokens(self) -> float:
        return self.micro_batch * self.gpt.seq_length / self.cp

    @property
    def message(self) -> float:
        """Size of a layer's input or output, as it is stored and as it is sent to the next pipeline rank."""
        return self._tokens * self.gpt.hidden_size * self.element / (self.tp if self.sequence_parallel else 1)

    def layer(self, recompute: str, layer: Layer | None = None) -> float:
        """Size of all that a layer stores; by default the model's first."""
        layer = self.gpt.layers[0] if layer is None else layer
        if recompute == "full":
            return self.message
        again = self.modules if recompute == "selective" else ()
        if "moe" in again:
            again = (*again, "moe_act", "shared_experts")
        linear = self._linear(layer)
        masks = len(layer.blocks) * self.message / self.element if self.gpt.hidden_dropout else 0.0
        norms = len(layer.blocks) * self._norm(0 if "layernorm" in again else linear)
        more = self._prediction(linear) if isinstance(layer, Prediction) else 0.0
        tokens = self._of(linear)
        kept = (each for block in layer.blocks for each in kept_by(block, tokens))
        return norms + masks + more + sum(each.size for each in kept if each.word not in again)

    def working(self, recompute: str, layer: Layer | None = None) -> float:
        """Size of what a backward makes again, one layer at a time."""
        return self.layer("none", layer) - self.layer(recompute, layer)

    def _linear(self, layer: Layer) -> int:
        return (self.linear if layer.is_fp8 else 0) or self.element

    def _of(self, linear: int) -> Tokens:
        return Tokens(
            self.gpt.seq_length, self._tokens, self.tp, self.etp, self.sequence_parallel, self.element, linear,
            self.flash_attention, self.gpt.attention_dropout, self.gpt.rotary and not self.gpt.learned_positions,
            self._saved_by_norm,
        )  # fmt: skip

    def _norm(self, linear: int) -> float:
        """Size of what a norm saves, and of its output, which the matrix product behind it saves."""
        return self.message * (self._saved_by_norm + linear) / self.element

    @property
    def _saved_by_norm(self) -> int:
        """Bytes of an element."""
        return self.element if self.fused_rms_norm or not self.gpt.rms_norm else 8

    def _prediction(self, linear: int) -> float:
        """Size of three norms and a projection's input of multi-token prediction, and of its logits."""
        return self._norm(self.element) + 2 * self._norm(linear) + 4.0 * self._logits() + 16.0 * self._tokens

    def owed(self, layer: Layer | None = None) -> float:
        """Size of what a layer keeps for its W after its I: inputs and output gradients of its linear layers.

        Per token h, the attention's output, h and the MLP's width go in; queries with keys and values, h, fc1's output
        and h come out. At widths of h, 3 h and 4 h that is 16 s b h elements. Tensor parallelism splits what is as wide
        as heads or MLP. Sequence parallelism splits the inputs of h, which the W gathers again; the output gradients
        of h are gathered for the I, and the W keeps them whole. So owes integration/step/weight_gradients.py.
        """
        layer, split = self.gpt.layers[0] if layer is None else layer, Split(self.tp, self.cp, self.ep, self.etp)
        kept = 0.0
        for gemm in layer.gemms(int(self._tokens), split):
            gathered = self.sequence_parallel and self.tp > 1 and gemm.k == self.gpt.hidden_size
            kept += gemm.products * gemm.m * (gemm.n + gemm.k / (self.tp if gathered else 1))
        return kept * self._linear(layer)

    def owed_head(self) -> float:
        """Size of what the output layer keeps for its W: its input and the logits' gradient. A tied one is whole."""
        return float(self.element * self._logits()) + self.message if self.gpt.untied else 0.0

    def embedding(self) -> float:
        """Size of token and position numbers and of the dropout's mask; the output is the first layer's input."""
        mask = self.message / self.element if self.gpt.hidden_dropout else 0.0
        return 16.0 * self._tokens + mask

    def head(self) -> float:
        """Size of the final norm's input and output, and of the softmax over the vocabulary in fp32."""
        return self._norm(self.element) + 4.0 * self._logits() + 16.0 * self._tokens

    def head_working(self) -> float:
        """Size of the logits and their gradient in the model's precision."""
        return float(self.element * self._logits())

    def _logits(self) -> float:
        return self._tokens * self.gpt.padded_vocab(self.tp) // self.tp

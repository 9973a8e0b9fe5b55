"""Bytes that a forward leaves for its backward, on one tensor-parallel rank, per layer and micro-batch.

They are the tensors that autograd saves, each storage once, as Megatron's layers with fused norms and SwiGLU save them,
without the norms' statistics (8 bytes a token); and what an owed gradient of a layer's weights keeps of them. With s
positions, b sequences, h hidden, t tensor-parallel ranks and e bytes an element:
    split by t only with sequence parallelism: inputs and outputs of the norms (4 s b h e), dropout masks
    always split by t: queries, keys and values; the attention's output; input and output of the activation function
    attention without a flash kernel: its probabilities, s^2 b heads e / t, and with dropout a second copy and a mask
Source of the method: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198; the numbers are counted from the code and tested against torch's saved-tensor hooks.
"""

from dataclasses import dataclass

from .model import GPT

__all__ = ["Activations"]


@dataclass(frozen=True)
class Activations:
    """The activations of one micro-batch, in bytes."""

    gpt: GPT
    micro_batch: int
    tp: int
    sequence_parallel: bool
    element: int  # bytes
    flash_attention: bool  # False: the probabilities are stored, as by Megatron's local layers
    linear: int = 0  # bytes an element of the inputs that matrix products save; 0: `element`
    fused_rms_norm: bool = True  # False: torch's on a CPU, which saves its input and its result before scaling in fp32

    @property
    def _tokens(self) -> int:
        return self.micro_batch * self.gpt.seq_length

    @property
    def message(self) -> float:
        """Size of a layer's input or output, as it is stored and as it is sent to the next pipeline rank."""
        return self._tokens * self.gpt.hidden_size * self.element / (self.tp if self.sequence_parallel else 1)

    def layer(self, recompute: str) -> float:
        """Size of all that a layer stores."""
        if recompute == "full":
            return self.message
        return self._outside_attention() + (0.0 if recompute == "selective" else self._attention_square())

    def working(self, recompute: str) -> float:
        """Size of what a backward makes again, one layer at a time."""
        return self.layer("none") - self.layer(recompute)

    def _outside_attention(self) -> float:
        gpt, per_rank = self.gpt, self._tokens * self.element / self.tp
        linear = self.linear or self.element
        norms = 2 * self._norm(linear)
        masks = 2 * self.message / self.element if gpt.hidden_dropout else 0.0
        # Saved are fc1's output, which the activation function keeps, and fc2's input. In fp8 the attention keeps its
        # output too.
        inputs = gpt.ffn * linear + gpt.query_width * (linear + (0 if linear == self.element else self.element))
        return norms + masks + per_rank * (self._qkv() + gpt.fc1_width) + per_rank / self.element * inputs

    def _norm(self, linear: int) -> float:
        """Size of what a norm saves, and of its output, which the matrix product behind it saves."""
        saved = self.element if self.fused_rms_norm or not self.gpt.rms_norm else 8
        return self.message * (saved + linear) / self.element

    def _qkv(self) -> int:
        """Elements per token of the queries, keys and values that the attention keeps, on all ranks together."""
        gpt = self.gpt
        if not self.flash_attention and gpt.groups < gpt.num_attention_heads:
            return 3 * gpt.query_width  # keys and values repeated for each head; the projection's output is freed
        # Rotation copies queries and keys; the values stay a view of the projection's output, and so keep all of it.
        rotated = 0 if gpt.learned_positions else gpt.qkv_width - gpt.head_width * gpt.groups
        return gpt.qkv_width + rotated

    def _attention_square(self) -> float:
        if self.flash_attention:
            return 0.0
        probabilities = self._tokens * self.gpt.seq_length * self.gpt.num_attention_heads / self.tp
        return probabilities * (2 * self.element + 1 if self.gpt.attention_dropout else self.element)

    def owed(self) -> float:
        """Size of what a layer keeps for its W after its I: inputs and output gradients of its four linear layers.

        Per token h, the attention's output, h and the MLP's width go in; queries with keys and values, h, fc1's output
        and h come out. At widths of h, 3 h and 4 h that is 16 s b h elements. Tensor parallelism splits what is as wide
        as heads or MLP. Sequence parallelism splits the inputs of h, which the W gathers again; the output gradients
        of h are gathered for the I, and the W keeps them whole. So owes integration/step/weight_gradients.py.
        """
        gpt, h = self.gpt, self.gpt.hidden_size
        wide = (gpt.query_width + gpt.ffn + gpt.qkv_width + gpt.fc1_width) / self.tp
        return self._tokens * (self.linear or self.element) * (wide + 2 * h) + 2 * self._input()

    def owed_head(self) -> float:
        """Size of what the output layer keeps for its W: its input and the logits' gradient. A tied one is whole."""
        return float(self.element * self._logits()) + self.message if self.gpt.untied else 0.0

    def _input(self) -> float:
        """Size of an input of h that a linear layer keeps, as it is between layers."""
        return self.message * (self.linear or self.element) / self.element

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

    def _logits(self) -> int:
        return self._tokens * self.gpt.padded_vocab(self.tp) // self.tp

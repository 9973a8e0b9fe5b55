"""A GPT as Megatron builds it: its layers, its ends, and its floating-point operations.

Sizes are counted in parameters, operations in FLOPs (a multiplication and an addition are two).
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

from ...console.errors import UserError
from ...schedule.costs import Times, times_of
from ...schedule.model.layers import ffn_width
from .attention import Attention, Block, LatentAttention
from .kinds import Kinds
from .layers import Layer, Prediction
from .mlp import MLP, Experts
from .recurrent import GatedDelta, Mamba
from .split import Gemm, Split
from .stages import Stage

__all__ = ["GPT"]


@dataclass(frozen=True)
class GPT(Kinds):
    """The sizes of a model, in the words of Megatron's flags, and the kinds of layers that are not dense."""

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
    swiglu: bool = False  # or another gated activation
    untied: bool = False
    rms_norm: bool = False
    linear_bias: bool = True
    qkv_bias: bool = False  # where linear_bias is False
    qk_layernorm: bool = False
    learned_positions: bool = True  # False: rotary
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    rotary: bool = True  # where the positions are not learned; False: no positions at all
    padded_vocab_size: int = 0  # 0: as Megatron pads it
    has_gated_attention: bool = False
    has_softmax_sink: bool = False
    latent: LatentAttention | None = None  # in place of the attention
    experts: Experts | None = None
    expert_layers: tuple[int, ...] = ()  # 1 for each layer with experts, 0 for a dense one; (): all have them
    delta: GatedDelta | None = None
    delta_layers: tuple[int, ...] = ()  # 1 for each layer, those of MTP too, with `delta` in place of the attention
    pattern: str = ""  # of a hybrid model: M, G, *, - or E for each layer, which has that block alone
    mamba: Mamba | None = None
    mtp_layers: int = 0
    mtp_pattern: str = ""  # of a hybrid model: the blocks of one of them
    mtp_is_repeated: bool = False  # they share their parameters
    first_in_bf16: int = 0  # layers that fp8 leaves out
    last_in_bf16: int = 0

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
        return self.ffn_hidden_size or ffn_width(self.hidden_size, self.swiglu)

    @property
    def norm(self) -> int:
        """The parameters of a norm, per element."""
        return 1 if self.rms_norm else 2

    def padded_vocab(self, tp: int) -> int:
        """Pad the vocabulary as megatron.training.vocab_utils.calculate_padded_vocab_size does."""
        multiple = self.make_vocab_size_divisible_by * tp
        return self.padded_vocab_size or -(-self.vocab_size // multiple) * multiple

    # Layers

    @property
    def attention(self) -> Block:
        if self.latent is not None:
            return self.latent
        return Attention(
            self.hidden_size, self.num_attention_heads, self.groups, self.head_width, self.linear_bias, self.qkv_bias,
            self.norm if self.qk_layernorm else 0, self.has_gated_attention, self.has_softmax_sink,
        )  # fmt: skip

    @property
    def mlp(self) -> MLP:
        return MLP(self.hidden_size, self.ffn, self.swiglu, self.linear_bias)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the decoder in order."""
        if self.pattern:
            return tuple(self._layer((self._block(symbol),), number) for number, symbol in enumerate(self.pattern))
        return tuple(
            self._layer((self._mixer(number), self._second(number)), number) for number in range(self.num_layers)
        )

    @cached_property
    def predictions(self) -> tuple[Prediction, ...]:
        """The layers of multi-token prediction, which follow the decoder's and are like its last."""
        last = self.num_layers - 1
        found = []
        for depth in range(1 if self.mtp_is_repeated else self.mtp_layers):
            blocks = tuple(map(self._block, self.mtp_pattern)) or (self._mixer(last + 1 + depth), self._second(last))
            found.append(Prediction(self.hidden_size, blocks, self.norm, not self.last_in_bf16))
        return tuple(found)

    def _layer(self, blocks: tuple[Block, ...], number: int) -> Layer:
        is_fp8 = self.first_in_bf16 <= number < self.num_layers - self.last_in_bf16
        return Layer(self.hidden_size, blocks, self.norm, is_fp8)

    def _mixer(self, number: int) -> Block:
        is_delta = self.delta is not None and bool(self.delta_layers[number])
        return self.delta if is_delta and self.delta is not None else self.attention

    def _second(self, number: int) -> Block:
        has_experts = self.experts is not None and (not self.expert_layers or bool(self.expert_layers[number]))
        return self.experts if has_experts and self.experts is not None else self.mlp

    def _block(self, symbol: str) -> Block:
        found = {"M": self.mamba, "G": self.delta, "*": self.attention, "-": self.mlp, "E": self.experts}[symbol]
        if found is None:
            raise UserError(f"--hybrid-layer-pattern has a layer {symbol}, whose sizes are not given.\n"
                            "  E needs --num-experts, G the --linear-... flags.")  # fmt: skip
        return found

    # Parameters of one tensor-parallel rank

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
        return self.norm * self.hidden_size + (self.padded_vocab(tp) // tp * self.hidden_size if has_matrix else 0)

    def stage_parameters(self, stage: Stage, tp: int = 1) -> int:
        """Count the parameters of a stage that data parallelism replicates. In a model with multi-token prediction its
        stage has an embedding too, and the final norm stands behind the last decoder layer, wherever that is.
        """
        return self.once((stage, tp), lambda: self._parameters_of(stage, tp))

    def sizes(self, split: Split) -> tuple[list[int], list[int]]:
        """Count the parameters of one layer of each kind on one rank: those that data parallelism replicates, and
        those of experts.
        """
        return self.once(split, lambda: (
            [kind.parameters(split.tp) for kind in self.kinds], [kind.expert_parameters(split) for kind in self.kinds],
        ))  # fmt: skip

    def _parameters_of(self, stage: Stage, tp: int) -> int:
        count = int(self.on_stage(stage, self.sizes(Split(tp))[0]))
        count += self.embedding_parameters(tp) if stage.is_first or stage.mtp else 0
        has_norm = stage.is_last
        if self.mtp_layers:
            has_norm = stage.layers > 0 and stage.first + stage.layers == self.num_layers
        norm = self.norm * self.hidden_size
        count += self.head_parameters(tp, stage.is_first) - norm if stage.is_last else 0
        return count + (norm if has_norm else 0)

    def stage_expert_parameters(self, stage: Stage, split: Split) -> int:
        """Count the parameters of the experts of a stage on one rank."""
        return int(self.on_stage(stage, self.sizes(split)[1]))

    @cached_property
    def parameters(self) -> int:
        """Count the parameters of the whole model, a tied embedding once."""
        layers = (*self.layers, *self.predictions)
        count = sum(layer.parameters() + layer.expert_parameters(Split()) for layer in layers)
        return count + self.embedding_parameters() + self.head_parameters(alone=True)

    @cached_property
    def routed_parameters(self) -> int:
        """Count those of all experts."""
        return sum(layer.expert_parameters(Split()) for layer in (*self.layers, *self.predictions))

    @cached_property
    def ends_in_layers(self) -> float:
        """The time of the output layer and of multi-token prediction, in decoder layers, by their operations."""
        layer = sum(each.operations(self.seq_length) for each in self.layers) / self.num_layers
        head = 2.0 * self.hidden_size * self.padded_vocab(1) * (1 + self.mtp_layers)
        return (head + sum(each.operations(self.seq_length) for each in self.predictions)) / layer

    @property
    def active_parameters(self) -> int:
        """Count the parameters that a token meets: of the experts, those that are chosen for it."""
        experts = self.experts
        if experts is None:
            return self.parameters
        return self.parameters - self.routed_parameters * (experts.count - experts.chosen) // experts.count

    # Operations

    def head_gemm(self, micro_batch: int, split: Split) -> Gemm:
        """Return the product that makes the logits."""
        tokens = micro_batch * self.seq_length // split.cp
        return Gemm(tokens, self.padded_vocab(split.tp) // split.tp, self.hidden_size)

    def times(self, recompute: str) -> Times:
        """Return f, i and w as the plugin estimates them where it chooses how many micro-batches await their W."""
        return times_of(self.arguments(recompute))

    def arguments(self, recompute: str) -> SimpleNamespace:
        """Return the sizes by the names that Megatron's parser gives them, as far as they count for operations."""
        names = ("hidden_size", "seq_length", "num_attention_heads", "swiglu")
        sizes = {name: getattr(self, name) for name in names} | {
            "ffn_hidden_size": self.ffn, "kv_channels": self.head_width, "num_query_groups": self.groups,
            "group_query_attention": True, "recompute_granularity": recompute,
            "vocab_size": self.vocab_size, "padded_vocab_size": self.padded_vocab_size,
            "hybrid_layer_pattern": self.pattern or None, "attention_output_gate": self.has_gated_attention,
        }  # fmt: skip
        if (experts := self.experts) is not None:
            sizes |= {
                "num_experts": experts.count, "moe_ffn_hidden_size": experts.ffn, "moe_router_topk": experts.chosen,
                "moe_shared_expert_intermediate_size": experts.shared_ffn, "moe_latent_size": experts.latent,
            }  # fmt: skip
        if (latent := self.latent) is not None:
            sizes |= {
                "multi_latent_attention": True, "q_lora_rank": latent.query_rank, "kv_lora_rank": latent.rank,
                "qk_head_dim": latent.width, "qk_pos_emb_head_dim": latent.rotated, "v_head_dim": latent.value_width,
            }  # fmt: skip
        if (mamba := self.mamba) is not None:
            sizes |= {
                "mamba_num_heads": mamba.heads, "mamba_head_dim": mamba.width, "mamba_state_dim": mamba.state,
                "mamba_num_groups": mamba.groups,
            }  # fmt: skip
        if (delta := self.delta) is not None:
            sizes |= {
                "linear_num_key_heads": delta.key_heads, "linear_num_value_heads": delta.value_heads,
                "linear_key_head_dim": delta.key_width, "linear_value_head_dim": delta.value_width,
                "linear_conv_kernel_dim": delta.convolution,
            }  # fmt: skip
        return SimpleNamespace(**sizes)

    def flops(self, sequences: int) -> float:
        """Count the operations of a step as megatron.training.training.num_floating_point_operations does.

        Forward and backward (3 x forward), half of the attention's square (causal mask), no recomputation.
        """
        return 3.0 * sequences * self.seq_length * self.once("operations", self._operations)

    def _operations(self) -> float:
        """Count those of a token in a forward."""
        h, s = self.hidden_size, self.seq_length
        mtp = self.mtp_layers * (self.predictions[:1] if self.mtp_is_repeated else ()) or self.predictions
        per_token = sum(layer.operations(s) for layer in (*self.layers, *mtp))
        per_token += 2.0 * h * self.padded_vocab(1) * (1 + self.mtp_layers)
        if not self.pattern:  # of hybrid models Megatron counts no projections of the predictions
            per_token += 2.0 * self.mtp_layers * (3 * h + 2 * h * h)
        return per_token

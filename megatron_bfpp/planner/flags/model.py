"""The model that parsed flags describe."""

import argparse

from ...console.errors import UserError
from ...schedule.model.layers import ffn_width
from ...schedule.model.pattern import flag_of, is_hybrid, parts_of
from ..model import GPT, Experts, GatedDelta, LatentAttention, Mamba
from .layers import Hybrid, hybrid_of, marked
from .vocabulary import vocabulary_of

__all__ = ["gpt_of", "hybrid", "precision_of"]

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
_SAME = ("hidden_size", "num_attention_heads", "make_vocab_size_divisible_by", "hidden_dropout", "attention_dropout")
_OR_ZERO = ("ffn_hidden_size", "kv_channels", "max_position_embeddings", "padded_vocab_size")


def gpt_of(args: argparse.Namespace) -> GPT:
    """Return the model of parsed flags. Raises UserError for a missing size, or sizes that do not fit together."""
    pattern = hybrid(args)
    _complete(args, pattern)
    missing = [f"--{name.replace('_', '-')}" for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise UserError(f"the model lacks {', '.join(missing)}.\n"
                        "  Give a file of configs/, or Megatron's flags after --.")  # fmt: skip
    layers, mtp = args.num_layers, args.mtp_num_layers or 0
    experts = _experts(args)
    positions = "rope" if args.use_rotary_position_embeddings else args.position_embedding_type
    return GPT(
        num_layers=layers, seq_length=args.seq_length, vocab_size=vocabulary_of(args),
        **{name: getattr(args, name) for name in _SAME}, **{name: getattr(args, name) or 0 for name in _OR_ZERO},
        num_query_groups=args.num_query_groups if args.group_query_attention else 0,
        swiglu=args.swiglu or args.quick_geglu, untied=args.untie_embeddings_and_output_weights,
        rms_norm=args.normalization == "RMSNorm", linear_bias=not args.disable_bias_linear, qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm, learned_positions=positions == "learned_absolute",
        rotary=positions in ("rope", "yarn", "mrope"), has_gated_attention=args.attention_output_gate,
        has_softmax_sink=args.softmax_type == "learnable", latent=_latent(args), experts=experts,
        expert_layers=marked("--moe-layer-freq", args.moe_layer_freq, layers, False) if experts else (),
        delta=_delta(args), delta_layers=_delta_layers(args, layers + mtp), mtp_layers=mtp,
        mtp_is_repeated=args.mtp_use_repeated_layer, pattern="".join(pattern.stages) if pattern else "",
        mtp_pattern=pattern.mtp if pattern else "", mamba=_mamba(args) if pattern else None,
        first_in_bf16=args.num_layers_at_start_in_bf16 if args.first_last_layers_bf16 else 0,
        last_in_bf16=args.num_layers_at_end_in_bf16 if args.first_last_layers_bf16 else 0,
    )  # fmt: skip


def hybrid(args: argparse.Namespace) -> Hybrid | None:
    """Return the pattern of a hybrid model's layers; None for another model."""
    if not is_hybrid(args):
        return None
    pattern, mtp = parts_of(args, flag_of(args))
    return hybrid_of("/".join([pattern, *mtp]))


def _complete(args: argparse.Namespace, pattern: Hybrid | None) -> None:
    """Fill in what Megatron derives."""
    if pattern is not None:
        args.num_layers = sum(map(len, pattern.stages))
        args.mtp_num_layers = pattern.mtp_layers or args.mtp_num_layers
        if args.mtp_num_layers and not pattern.mtp:
            raise UserError("--mtp-num-layers of a hybrid model needs their layers: --hybrid-layer-pattern M-M*/M-.")
    if args.seq_length is None and args.max_position_embeddings is not None:
        args.seq_length = args.max_position_embeddings
        args.notes.append(f"--seq-length is not given: {args.seq_length}, as --max-position-embeddings")


def _experts(args: argparse.Namespace) -> Experts | None:
    if args.num_experts is None:
        return None
    chosen = args.moe_router_topk
    if chosen > args.num_experts:
        raise UserError(f"--moe-router-topk {chosen} is more than --num-experts {args.num_experts}.\n"
                        "  Change one of them.")  # fmt: skip
    ffn = args.moe_ffn_hidden_size or args.ffn_hidden_size or ffn_width(args.hidden_size, args.swiglu)
    return Experts(
        args.hidden_size, args.num_experts, chosen, ffn, args.swiglu or args.quick_geglu,
        not args.disable_bias_linear, args.moe_shared_expert_intermediate_size or 0, args.moe_shared_expert_gate,
        args.moe_latent_size or 0,
    )  # fmt: skip


def _latent(args: argparse.Namespace) -> LatentAttention | None:
    if not args.multi_latent_attention:
        return None
    norm = 1 if args.normalization == "RMSNorm" else 2
    return LatentAttention(
        args.hidden_size, args.num_attention_heads, args.q_lora_rank or 0, args.kv_lora_rank, args.qk_head_dim,
        args.qk_pos_emb_head_dim, args.v_head_dim, not args.disable_bias_linear, norm if args.qk_layernorm else 0,
        is_down_split=args.transformer_impl == "local",
    )  # fmt: skip


def _mamba(args: argparse.Namespace) -> Mamba:
    width = args.mamba_head_dim
    heads = args.mamba_num_heads or 2 * args.hidden_size // width
    return Mamba(args.hidden_size, heads, width, args.mamba_state_dim, args.mamba_num_groups)


def _delta(args: argparse.Namespace) -> GatedDelta | None:
    pattern = hybrid(args)
    if args.experimental_attention_variant is None and not (pattern and "G" in "".join(pattern.stages)):
        return None
    return GatedDelta(
        args.hidden_size, args.linear_num_key_heads, args.linear_num_value_heads, args.linear_key_head_dim,
        args.linear_value_head_dim, args.linear_conv_kernel_dim, 1 if args.normalization == "RMSNorm" else 2,
    )  # fmt: skip


def _delta_layers(args: argparse.Namespace, layers: int) -> tuple[int, ...]:
    if args.experimental_attention_variant is None:
        return ()
    if args.linear_attention_freq is None:
        raise UserError("--experimental-attention-variant gated_delta_net needs --linear-attention-freq.\n"
                        "  Give which layers have it: 4 for all but every fourth.")  # fmt: skip
    return marked("--linear-attention-freq", args.linear_attention_freq, layers, True)


def precision_of(args: argparse.Namespace) -> str | None:
    """Return the precision that the flags name, if any. fp8 is that of the layers' products, fp8-params of their
    parameters too.
    """
    if args.fp8_format is not None:
        return "fp8-params" if args.fp8_param_gather else "fp8"
    return "bf16" if args.bf16 else "fp16" if args.fp16 else None

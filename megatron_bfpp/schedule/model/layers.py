"""The operations of each kind of layer, from the sizes on Megatron's command line."""

from collections.abc import Callable
from typing import Any


def layer_flops(args: Any, kind: str) -> tuple[float, float]:
    """Return the operations of one token's forward in a layer: in products with weights, and in all others.

    args: the sizes, by the names that Megatron's parser gives them; its defaults count before it fills them in.
    kind: of LAYER_KINDS, the letters of Megatron's hybrid patterns; a layer of a GPT is an attention and an MLP, or
    experts.
    A causal mask leaves a token half of the sequence to look at. Of experts a token goes through as many as its router
    chooses, and through the shared one. Left out: norms, activations, the router, embeddings. What a layer with few
    operations for its bytes takes beyond this, as the convolution and the scan of Mamba and GDN do, is not in here.

    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix, for a GPT; for the others the weights' shapes, and for
    recurrences the counts of megatron.training's num_floating_point_operations.
    """
    linear, other = LAYER_KINDS[kind](args)
    return 2.0 * linear, 2.0 * other


Flops = tuple[float, float]  # multiplications of one token: with weights, and without


def _size(args: Any, name: str, default: float) -> float:
    return getattr(args, name, None) or default


def _attention(args: Any) -> Flops:
    hidden, heads = args.hidden_size, _size(args, "num_attention_heads", 1)
    queries = heads * _size(args, "kv_channels", hidden / heads)
    groups = _size(args, "num_query_groups", heads) if getattr(args, "group_query_attention", False) else heads
    gate = queries if getattr(args, "attention_output_gate", False) else 0
    return hidden * (2 * queries + 2 * queries * groups / heads + gate), args.seq_length * queries


def _latent_projections(args: Any) -> tuple[float, float]:
    """Return the weights of multi-latent attention, and what a token multiplies with one that it looks at."""
    hidden, heads = args.hidden_size, _size(args, "num_attention_heads", 1)
    key, position = _size(args, "qk_head_dim", 128), _size(args, "qk_pos_emb_head_dim", 64)
    value, latent = _size(args, "v_head_dim", 128), _size(args, "kv_lora_rank", 512)
    rank, queries = getattr(args, "q_lora_rank", None), heads * (key + position)
    linear = rank * (hidden + queries) if rank else hidden * queries
    linear += hidden * (latent + position) + latent * heads * (key + value) + heads * value * hidden
    return linear, heads * (key + position + value)


def _latent_attention(args: Any) -> Flops:
    linear, pair = _latent_projections(args)
    return linear, args.seq_length / 2 * pair


def _sparse_attention(args: Any) -> Flops:
    """An indexer scores all tokens before this one, and attention looks at the best: a fused kernel at those only."""
    linear, pair = _latent_projections(args)
    heads, width = _size(args, "dsa_indexer_n_heads", 0), _size(args, "dsa_indexer_head_dim", 0)
    queries_of = getattr(args, "q_lora_rank", None) or args.hidden_size
    linear += queries_of * heads * width + args.hidden_size * (width + heads)
    seen = args.seq_length / 2
    return linear, seen * heads * width + min(seen, _size(args, "dsa_indexer_topk", seen)) * pair


def ffn_width(hidden_size: int, is_gated: bool) -> int:
    """Return the width of an MLP where no flag gives it, as validate_args of megatron.training.arguments has it."""
    return int(4 * hidden_size * 2 / 3 / 64) * 64 if is_gated else 4 * hidden_size


def _ffn(args: Any) -> tuple[int, float]:
    """Return the matrices of an MLP, and its width."""
    is_gated = getattr(args, "swiglu", False)
    return 3 if is_gated else 2, _size(args, "ffn_hidden_size", ffn_width(args.hidden_size, is_gated))


def _mlp(args: Any) -> Flops:
    matrices, width = _ffn(args)
    return args.hidden_size * matrices * width, 0.0


def _experts(args: Any) -> Flops:
    hidden, (matrices, width) = args.hidden_size, _ffn(args)
    latent, shared = getattr(args, "moe_latent_size", None), _size(args, "moe_shared_expert_intermediate_size", 0)
    routed = _size(args, "moe_ffn_hidden_size", width) * _size(args, "moe_router_topk", 1)
    around = 2 * hidden * latent if latent else 0  # into the experts' width and back
    return matrices * (routed * (latent or hidden) + shared * hidden) + around, 0.0


def _mamba(args: Any) -> Flops:
    hidden, state = args.hidden_size, _size(args, "mamba_state_dim", 128)
    width = _size(args, "mamba_head_dim", 64)
    heads = _size(args, "mamba_num_heads", 2 * hidden // width)
    inner, both = heads * width, 2 * _size(args, "mamba_num_groups", 8) * state
    convolution, scan = 4 * (inner + both), 3.5 * inner * state
    return hidden * (2 * inner + both + heads) + inner * hidden, convolution + scan


def _gated_delta_net(args: Any) -> Flops:
    heads, width = _size(args, "linear_num_value_heads", 32), _size(args, "linear_value_head_dim", 128)
    keys = _size(args, "linear_num_key_heads", 16) * _size(args, "linear_key_head_dim", 128)
    values = heads * width
    inputs = 2 * keys + 2 * values + 2 * heads
    if getattr(args, "experimental_attention_variant", None) == "gdn2":
        inputs = 4 * keys + 3 * values
    convolution = _size(args, "linear_conv_kernel_dim", 4) * (2 * keys + values)
    return args.hidden_size * (inputs + values), convolution + 4 * heads * width**2


LAYER_KINDS: dict[str, Callable[[Any], Flops]] = {
    "*": _attention, "+": _latent_attention, "D": _sparse_attention, "-": _mlp, "E": _experts, "M": _mamba,
    "G": _gated_delta_net,
}  # fmt: skip

"""Estimates how long the parts of a micro-batch take, from the sizes on a command line. No import of Megatron."""

from typing import Any

Times = tuple[float, float, float]  # of F, I and W, in forwards
EQUAL: Times = (1.0, 1.0, 1.0)


def times_of(args: Any) -> Times:
    """Return the times of a layer's forward, input gradient and weights' gradients, by their multiplications.

    A linear layer takes the same three times. Attention between tokens (2 s h multiplications of a token with a causal
    mask) has no weights: once in F, twice in I. Full recomputation runs a forward again in I. Of experts a token goes
    through as many as its router chooses. Communication and memory-bound work are left out. EQUAL where args has no
    sizes, as without megatron.training.

    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix, counts them for a GPT; here per part.
    """
    hidden, sequence = (getattr(args, name, None) for name in ("hidden_size", "seq_length"))
    if not hidden or not sequence:
        return EQUAL
    heads = getattr(args, "num_attention_heads", None) or 1
    queries = heads * (getattr(args, "kv_channels", None) or hidden / heads)
    groups = getattr(args, "num_query_groups", None) if getattr(args, "group_query_attention", False) else None
    keys = queries * (groups or heads) / heads
    experts = getattr(args, "num_experts", None)
    inner = (getattr(args, "moe_ffn_hidden_size", None) if experts else None) or getattr(args, "ffn_hidden_size", None)
    inner = (inner or 4 * hidden) * ((getattr(args, "moe_router_topk", None) or 1) if experts else 1)
    matrices = 3 if getattr(args, "swiglu", False) else 2
    linear = 2 * hidden * (2 * queries + 2 * keys + matrices * inner)
    attention = 2 * sequence * queries
    forward = linear + attention
    again = forward if getattr(args, "recompute_granularity", None) == "full" else 0
    return 1.0, (linear + 2 * attention + again) / forward, linear / forward

"""The durations of a step and the waits of a runtime, with which `replay` predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .ir import Action, Op


@dataclass(frozen=True)
class Costs:
    """Durations, in one unit of the caller's choice.

    forward, backward, weights: one number for all stages, or one for each stage in order.
    hop, transfer, shared_card: one value for all messages, or one for each edge of the ring of ranks. Edge e joins
        ranks e and e + 1, the last edge the last rank and the first.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    weights: float | Sequence[float] | None = None  # the part of a backward that is its W; None for half of it
    hop: float | Sequence[float] = 0.0  # the latency of a message between two ranks
    transfer: float | Sequence[float] = 0.0  # size / bandwidth of a message
    gather: float = 0.0  # of the parameters of a chunk (UNSHARD)
    reduction: float = 0.0  # of the gradients of a chunk (REDUCE_GRAD)
    # Parts in which a chunk is gathered during a forward and reduced during its last backward: all chunks if fully
    # sharded (FSDP's units), else the first rank's first chunk (Megatron's buckets).
    buckets: int = 1
    # True: messages share the bandwidth of a rank's network card with each other and with its collectives (cards.py).
    # False: each channel and the collectives have a card to themselves.
    shared_card: bool | Sequence[bool] = False

    def of(self, action: Action) -> float:
        """Return the duration of a compute action."""
        stage, op, _ = action
        if op is Op.F:
            return at(self.forward, stage)
        backward = at(self.backward, stage)
        if op is Op.B:
            return backward
        weights = backward / 2 if self.weights is None else at(self.weights, stage)
        return weights if op is Op.W else backward - weights

    def messages(self, pp_size: int) -> list[float]:
        """Return hop plus transfer of each edge of the ring."""
        return [at(self.hop, edge) + at(self.transfer, edge) for edge in range(pp_size)]


def at(cost: float | Sequence[float], index: int) -> float:
    """Return the cost with that index, or the only one."""
    return cost if isinstance(cost, int | float) else cost[index]


@dataclass(frozen=True)
class Waits:
    """The waits of a runtime, beside those that its actions need. The default is this plugin's executor."""

    for_sends: bool = True  # those launched SEND_WINDOW or more compute actions ago
    for_forward_sends: bool = False  # each send of an output, before the next action
    # The last backward of a stage launches its reduction bucket by bucket and waits for it.
    for_reductions: bool = False


UNIT = Costs()
OURS = Waits()
MEGATRON = Waits(for_forward_sends=True)  # since 0.18 (PR 4047), before the output is freed
# torch.distributed.pipelining's looped schedules, 2.14, with its DDP
TORCH = Waits(for_sends=False, for_reductions=True)

Times = tuple[float, float, float]  # of F, I and W, in forwards
EQUAL: Times = (1.0, 1.0, 1.0)


def times_of(args: Any) -> Times:
    """Return the times of a layer's forward, input gradient and weights' gradients, by their multiplications.

    args: the sizes, by the names that Megatron's parser gives them.
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

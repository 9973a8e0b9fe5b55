"""The durations of a step and the waits of a runtime, with which `replay` predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .ir import Action, Op
from .model.layers import LAYER_KINDS, layer_flops


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

    args: the sizes, by the names that Megatron's parser gives them. Of a hybrid model the mean of its layers.
    A product with weights takes the same three times. What has no weights is once in F and twice in I. Full
    recomputation runs a forward again in I. Communication and memory-bound work are left out. EQUAL where args has no
    sizes, as without megatron.training.
    """
    if not getattr(args, "hidden_size", None) or not getattr(args, "seq_length", None):
        return EQUAL
    attention = "+" if getattr(args, "multi_latent_attention", False) else "*"
    gpt = attention + ("E" if getattr(args, "num_experts", None) else "-")
    pattern = (getattr(args, "hybrid_layer_pattern", None) or gpt).partition("/")[0]
    each = [layer_flops(args, kind) for kind in pattern if kind in LAYER_KINDS]
    if not each:
        return EQUAL
    linear, other = map(sum, zip(*each, strict=True))
    forward = linear + other
    again = forward if getattr(args, "recompute_granularity", None) == "full" else 0
    return 1.0, (linear + 2 * other + again) / forward, linear / forward

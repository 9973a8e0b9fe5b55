"""The durations of a step and the waits of a runtime, with which `replay` predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

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

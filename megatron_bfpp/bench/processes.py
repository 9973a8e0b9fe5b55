"""Run the arms of a case in real processes, one per rank, and collect the times of their steps.

The processes are forked from one that has imported Megatron once; this one imports neither it nor torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..console.forked import Forks
from ..schedule import Schedule
from ..schedule.costs import at
from .case import ATTEMPTS, NUMBERS_PER_CARD, Case, Memory
from .emulate.shared_card import SharedCards

_BEHIND = 0.7  # of a forward: how late a rank may report a transfer on a shared card
_PATIENCE_S = 120.0  # beyond the expected duration; then a rank hangs


@dataclass(frozen=True)
class Measured:
    """The steps of a case.

    step_times_s: per arm; with data parallelism also, with FREE behind its name, with collectives that took no time.
    plans: of torch's arms, as torch made them, without its actions for sharded parameters.
    repeated: how many steps were run again, because the machine did not run the ranks when their work was due.
    """

    step_times_s: dict[str, list[float]]
    plans: dict[str, Schedule]
    repeated: int


def run_case(case: Case, on_step: Callable[[str], None] = lambda arm: None) -> Measured:
    """Run steps that alternate between the arms. on_step: called after each with its arm.

    Raises UserError where a rank fails, is killed or hangs.
    """
    found: dict[str, list[float]] = {arm + variant: [] for arm in case.arms for variant in case.variants}
    plans, repeated, expected_s = {}, 0, _expected_s(case)
    with Forks("megatron_bfpp.bench.ranks") as forks:
        memory = _memory(case, forks.context)
        for rank in range(case.ranks):
            forks.start(f"rank {rank}", _answers, rank, case, memory)
        while (answer := forks.next(ATTEMPTS * expected_s + _PATIENCE_S)) is not None:
            what, content = answer[1]
            if what == "plans":
                plans = content
                continue
            step_s, attempts = content
            found[what].append(step_s)
            repeated += attempts - 1
            on_step(what)
    return Measured(found, plans, repeated)


def _memory(case: Case, context: Any) -> Memory:
    shared = None
    if case.shares_card:
        shared = SharedCards(context, case.ranks, case.full_duplex, _BEHIND * at(case.costs.forward, 0))
    return Memory(context.Value("i", 0), context.Array("d", NUMBERS_PER_CARD * case.ranks), shared)


def _answers(rank: int, case: Case, memory: Memory) -> Iterator[tuple[str, Any]]:
    from .ranks import answers  # Megatron takes seconds to import

    yield from answers(rank, case, memory)


def _expected_s(case: Case) -> float:
    """Return a time, in seconds, within which a step of any arm ends."""
    shape, costs = case.shape, case.costs
    slots = (shape.num_chunks - 1) * max(shape.num_microbatches, shape.pp_size) + shape.num_microbatches + shape.pp_size
    collectives_s = 2 * shape.num_chunks * (costs.reduction + costs.gather)
    action_s = at(costs.forward, 0) + at(costs.backward, 0) + 2 * at(costs.hop, 0)
    return 4 * slots * action_s + collectives_s

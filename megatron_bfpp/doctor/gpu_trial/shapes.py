"""What the ranks of the trial and the command that judges them both know: shapes, arms, and what each step does."""

from ...schedule import Schedule
from ...schedule.names import ORDERS

ARMS = ORDERS[: ORDERS.index("breadth-first") + 1]
EQUAL_PP = (2, 3, 4)  # of the shapes whose bits are compared, PP x 2 chunks; each needs so many GPUs
QUIET_STEPS = 2  # of the walk, without a wait
ROUNDS = 6  # of the alternation; the first ones warm up
COUNTED = 4  # of the rounds, the last ones


def positions_of(plan: Schedule) -> list[tuple[int, int]]:
    """Return where the walk waits: (pp_rank, position in its list).

    One rank waits at a time: that is what `schedule.check` proves. Where all wait at one position, some would wait for
    what others have posted ahead.
    """
    return [(rank, place) for rank, actions in enumerate(plan) for place in range(len(actions))]


def flags_of(arm: str) -> tuple[str, str]:
    """Return --pipeline-schedule and --breadth-first-engine of an arm, which change between the steps of one job."""
    if arm == "interleaved-grouped":  # Megatron's loop with one group of a step's micro-batches
        return "breadth-first", "megatron"
    return "breadth-first" if arm == "breadth-first" else "1f1b", "plan"


def turns_of(chunks: int, pp: int) -> list[tuple[str, int]]:
    """Return the arms and numbers of micro-batches that take turns. chunks: per rank; 1F1B has one."""
    words = ("1f1b",) if chunks == 1 else tuple(word for word in ARMS if word != "1f1b")
    return [(word, count) for count in (pp, 2 * pp, 4 * pp) for word in words]

"""Judges the kernels of a step: whether messages and reductions run beside the computation, and cost it nothing."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from ...schedule.ir import Action, Op, PipelineShape
from .kernels import COLLECTIVE, COMPUTE, GEMM, RECEIVE, SEND, Kernel

# Of the sends, and of the receives: those that run beside computation. With its own hardware queue nearly all do; those
# of the fill and drain of the pipeline cannot. With one queue for all, or blocking waits, nearly none do.
LEAST_BESIDE = 0.5
TOUCH_US = 20.0  # a kernel that starts so soon behind the end of another one may have waited for it
MOST_BLOCKED = 0.01  # of the step: computation that was launched and ready, but stood behind another action's receive
MOST_GEMM = 1.05  # times the same products without messages


class Busy:
    """The union of some kernels' times."""

    def __init__(self, kernels: Iterable[Kernel]):
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted((each.start, each.end) for each in kernels):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def meets(self, kernel: Kernel) -> bool:
        """Return whether some of the union lies within the kernel's time."""
        return bisect_left(self._starts, kernel.end) > bisect_right(self._ends, kernel.start)


def beside(kernels: list[Kernel], kind: str) -> float:
    """Return which part of the kernels of a kind runs beside computation; 0 where there are none."""
    computing = Busy(each for each in kernels if each.kind in COMPUTE)
    some = [each for each in kernels if each.kind == kind]
    return sum(map(computing.meets, some)) / len(some) if some else 0.0


def late_receives(kernels: list[Kernel], shape: PipelineShape) -> list[str]:
    """Return the receives of a chunk that end only when the chunk before it has been computed.

    Of those that close the ring, to the first rank forward and to the last one backward: they were computed while that
    chunk still ran, all but the last P micro-batches, and 2 P with a hop of up to P forwards. Other neighbours begin a
    chunk together.
    """
    ends = {(each.kind, each.action): each.end for each in kernels}  # of its last kernel
    computed: dict[tuple[int, Op], float] = defaultdict(float)
    for each in kernels:
        if each.kind in COMPUTE and each.action:
            stage, op, _ = Action.parse(each.action)
            computed[stage, op] = max(computed[stage, op], each.end)
    late = []
    for (kind, name), end in ends.items():
        if kind == RECEIVE:
            stage, op, microbatch = Action.parse(name)
            # The chunk that this rank runs before: forwards one chunk back, backwards one chunk on.
            before = (stage - shape.pp_size, Op.F) if op is Op.RECV_F else (stage + shape.pp_size, Op.B)
            closes = shape.rank_of(stage) == (0 if op is Op.RECV_F else shape.pp_size - 1)
            early = (microbatch or 0) < max(1, shape.num_microbatches - 2 * shape.pp_size)
            if closes and early and before in computed and end > computed[before]:
                late.append(name)
    return late


def blocked(kernels: list[Kernel]) -> Iterator[tuple[str, float]]:
    """Yield (receive, microseconds) of gaps in the computation that end with the receive of another action.

    The computation behind such a gap was launched, and what it needs had arrived: it stood in a queue.
    """
    receives = sorted((each for each in kernels if each.kind == RECEIVE), key=lambda each: each.end)
    ends = [each.end for each in receives]
    arrived = {each.action: each.end for each in receives}
    until = float("-inf")
    for before, after in pairwise([each for each in kernels if each.kind in COMPUTE]):
        until = max(until, before.end)
        ready = max(until, after.launch, arrived.get(_needed(after.action), 0.0))
        if after.start - ready <= TOUCH_US:
            continue
        last = bisect_right(ends, after.start) - 1
        if last >= 0 and ends[last] >= after.start - TOUCH_US and receives[last].action != _needed(after.action):
            yield receives[last].action, after.start - max(ready, receives[last].start)


def _needed(action: str) -> str:
    """Return the receive that a forward or backward waits for."""
    if not action:
        return ""
    stage, op, microbatch = Action.parse(action)
    return str(Action(stage, {Op.F: Op.RECV_F, Op.B: Op.RECV_B}.get(op, op), microbatch))


def exposed_reductions(kernels: list[Kernel], shape: PipelineShape) -> tuple[int, list[int]]:
    """Return how many chunks but the first have reductions, and those of which none runs beside a backward."""
    backwards = Busy(each for each in kernels if each.kind in COMPUTE and _op(each.action) is Op.B)
    met: dict[int, bool] = defaultdict(bool)
    for each in kernels:
        if each.kind == COLLECTIVE and _op(each.action) in (Op.B, Op.REDUCE_GRAD):
            met[shape.chunk_of(Action.parse(each.action).stage)] |= backwards.meets(each)
    met.pop(0, None)  # the chunk whose backward is the last: nothing is left to run beside
    return len(met), [chunk for chunk, is_beside in met.items() if not is_beside]


def _op(action: str) -> Op | None:
    return Action.parse(action).op if action else None


def judge_rank(
    kernels: list[Kernel], quiet: list[Kernel], shape: PipelineShape, reduces: bool
) -> tuple[list[str], dict[str, float]]:
    """Return what is wrong with a rank's step, and its figures.

    quiet: the kernels of the same step without messages. reduces: whether there are replicas.
    """
    if not any(each.kind in COMPUTE for each in kernels):
        return ["its trace has no kernels"], {}
    shares = {kind: beside(kernels, kind) for kind in (SEND, RECEIVE)}
    wrong = [
        f"{share:.0%} of its {kind}s run beside computation, at least {LEAST_BESIDE:.0%} should"
        for kind, share in shares.items()
        if share < LEAST_BESIDE
    ]
    if late := late_receives(kernels, shape):
        wrong.append(f"{len(late)} receives ended after the chunk before theirs, {late[0]} first")
    gaps = sorted(blocked(kernels), key=lambda gap: -gap[1])
    step = kernels[-1].end - kernels[0].start
    standing = sum(length for _, length in gaps) / step
    if standing > MOST_BLOCKED:
        wrong.append(f"{standing:.1%} of its step stood behind pending receives, {gaps[0][0]} the longest")
    if reduces:
        count, exposed = exposed_reductions(kernels, shape)
        if not count:
            wrong.append("it has no reduction of a chunk but the first")
        elif exposed:
            wrong.append(f"reductions of chunks {exposed} run beside no backward")
    products, quiet_products = ([each for each in some if each.kind == GEMM] for some in (kernels, quiet))
    ratio = _time(products) / max(_time(quiet_products), 1e-9)
    if len(products) != len(quiet_products) or not products:
        wrong.append(f"it has {len(products)} matrix products, and {len(quiet_products)} without messages")
    elif ratio > MOST_GEMM:
        wrong.append(f"its matrix products take {ratio:.3f} x of those without messages, at most {MOST_GEMM} allowed")
    return wrong, {**shares, "blocked": standing, "gemm": ratio}


def _time(kernels: list[Kernel]) -> float:
    return sum(each.end - each.start for each in kernels)

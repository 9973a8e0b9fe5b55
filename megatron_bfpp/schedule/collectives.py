"""Time the data-parallel collectives of one rank, for `replay`."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .costs import Costs, Waits
from .ir import Action, Op


@dataclass(eq=False, slots=True)
class Collective:
    """A collective that has been launched."""

    launched: float
    duration: float
    end: float | None = None  # None until known: it depends on what else the card carries


class Collectives:
    """The collectives of a rank: one after the other, in the order of their launch, beside everything else it does.

    A chunk whose gather is not in the plan is gathered when its first forward would start, as Megatron's hooks do.
    carry: puts a collective on a shared card and sets its end later; without it each takes its duration.
    """

    def __init__(
        self, costs: Costs, waits: Waits, is_sharded: bool, num_microbatches: int,
        carry: Callable[[Collective], None] | None = None,
    ):  # fmt: skip
        self._costs, self._waits, self._is_sharded, self._microbatches = costs, waits, is_sharded, num_microbatches
        self._carry = carry
        self._gathered: dict[int, list[Collective]] = {}  # stage -> its buckets; empty once they were waited for
        self._backwards: dict[int, int] = {}  # stage -> how many B's or W's
        # Stages whose last backward launches their reduction -> buckets launched, and the time until when.
        self._reducing: dict[int, tuple[int, float]] = {}
        self._unfinished: deque[Collective] = deque()  # reductions whose gradients take memory (sharded)
        self._free = 0.0
        self._last: Collective | None = None  # reduction
        self._awaited: Collective | None = None  # a reduction that the next compute action waits for
        self.log: list[tuple[Action, Collective]] = []

    @property
    def reduced(self) -> float:
        """Return the end of the last reduction."""
        return 0.0 if self._last is None else self._last.end or 0.0

    def launch(self, action: Action, now: float) -> None:
        """Launch an UNSHARD or REDUCE_GRAD of the plan; a RESHARD takes no time."""
        stage, op, _ = action
        if op is Op.UNSHARD:
            self._gather(stage, now)
        elif op is Op.REDUCE_GRAD and stage not in self._reducing:
            # A sharded chunk is reduced behind its last W, whole; then its rank waits for the reduction before.
            self._awaited = self._last if self._is_sharded else None
            self._last = self._begin(action, now, self._costs.reduction)

    def compute(self, action: Action, start: float) -> tuple[float, float] | None:
        """Return (start, end) of a compute action that could start at `start`.

        None while that is not known: ask again when a collective has ended.
        """
        stage, op, microbatch = action
        duration = self._costs.of(action)
        if op is Op.F and microbatch == 0 and stage not in self._gathered:
            self._gather(stage, start)
        if self._awaited is not None:
            if self._awaited.end is None:
                return None
            start, self._awaited = max(start, self._awaited.end), None
        parts = self._gathered.get(stage) if op is not Op.W else None  # the weights' gradients need no weights
        if parts:
            if parts[-1].end is None:
                return None
            self._gathered[stage] = []
            if op is Op.F and len(parts) > 1:
                return self._in_parts(parts, start, duration)
            start = max(start, parts[-1].end)
        if op in (Op.B, Op.W):
            count = self._backwards.get(stage, 0) + 1
            if count == self._microbatches and self._is_reduced_in(op, stage):
                end = self._reduce(stage, start, duration)
                return None if end is None else (start, end)
            self._backwards[stage] = count
        return start, start + duration

    def _is_reduced_in(self, op: Op, stage: int) -> bool:
        """Return whether a stage's last B or W launches its reduction, or the REDUCE_GRAD behind it does."""
        if self._waits.for_reductions:
            return True
        return op is Op.B if self._is_sharded else self._buckets(stage) > 1

    @staticmethod
    def _in_parts(parts: list[Collective], start: float, duration: float) -> tuple[float, float]:
        """Return (start, end) of a forward whose layers run as they are gathered."""
        ends = [part.end for part in parts if part.end is not None]
        begin = now = max(start, ends[0])
        for end in ends:
            now = max(now, end) + duration / len(parts)
        return begin, now

    def _begin(self, action: Action, now: float, duration: float) -> Collective:
        collective = Collective(now, duration)
        self.log.append((action, collective))
        if self._carry is not None and duration:
            self._carry(collective)
        else:
            self._free = collective.end = max(now, self._free) + duration
        return collective

    def _buckets(self, stage: int) -> int:
        has_buckets = stage == 0 or self._is_sharded or self._waits.for_reductions
        return self._costs.buckets if has_buckets else 1

    def _gather(self, stage: int, now: float) -> None:
        buckets = self._buckets(stage)
        size = self._costs.gather / buckets
        self._gathered[stage] = [self._begin(Action(stage, Op.UNSHARD), now, size) for _ in range(buckets)]

    def _reduce(self, stage: int, start: float, duration: float) -> float | None:
        """Return the end of a stage's last backward, which launches its reductions; None while that is not known.

        Sharded: the gradients of at most one chunk wait for their reduction, so this backward waits for older ones.
        """
        buckets = self._buckets(stage)
        launched, now = self._reducing.get(stage, (0, start))
        for part in range(launched, buckets):
            done = now + duration / buckets
            if self._is_sharded and len(self._unfinished) == buckets:
                if self._unfinished[0].end is None:
                    self._reducing[stage] = part, now
                    return None
                done = max(done, self._unfinished.popleft().end or 0.0)
            now = done
            self._last = self._begin(Action(stage, Op.REDUCE_GRAD), now, self._costs.reduction / buckets)
            self._unfinished.append(self._last)
        self._reducing[stage] = buckets, now
        if not self._waits.for_reductions:
            return now
        assert self._last is not None, "a chunk is reduced in at least one part"
        return None if self._last.end is None else max(now, self._last.end)

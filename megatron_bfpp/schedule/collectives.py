"""When the data-parallel collectives of one rank run, for `replay`. Standard library only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .ir import Action, Op


@dataclass(frozen=True)
class Costs:
    """Durations, in one unit of the caller's choice. forward, backward: of every stage, or one for each stage in order."""

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    hop: float = 0.0  # of a message between two ranks, beside its transfer
    transfer: float = 0.0  # of a message: size / bandwidth
    gather: float = 0.0  # of the parameters of a chunk (UNSHARD)
    reduction: float = 0.0  # of the gradients of a chunk (REDUCE_GRAD)
    # In so many parts a chunk is gathered during a forward and reduced during its last backward: fully sharded ones (FSDP's units), and of
    # replicated ones the first rank's first chunk (Megatron's buckets).
    buckets: int = 1

    def of(self, action: Action) -> float:
        """Of a compute action."""
        cost = self.forward if action.op is Op.F else self.backward
        return cost if isinstance(cost, int | float) else cost[action.stage]


UNIT = Costs()


@dataclass(frozen=True)
class Waits:
    """What a runtime waits for, beside what its actions need. The default is this plugin's executor."""

    for_sends: bool = True  # those launched SEND_WINDOW or more compute actions ago
    for_forward_sends: bool = False  # each send of an output, before the next action
    for_reductions: bool = False  # in the last backward of a stage, for its reduction, which is launched there bucket by bucket


OURS = Waits()


class Collectives:
    """One after the other, in the order of their launch, beside everything else that the rank does.

    A chunk whose gather does not stand in the plan is gathered when its first forward would start, as Megatron's hooks do.
    """

    def __init__(self, costs: Costs, waits: Waits, is_sharded: bool, num_microbatches: int):
        self._costs, self._waits, self._is_sharded, self._microbatches = costs, waits, is_sharded, num_microbatches
        self._gathered: dict[int, list[float]] = {}  # stage -> when each bucket is there; empty once they were waited for
        self._backwards: dict[int, int] = {}  # stage -> how many
        self._in_backward: set[int] = set()  # stages whose reduction is launched
        self._unfinished: deque[float] = deque()  # ends of reductions whose gradients take memory (sharded)
        self._free = 0.0
        self.reduced = 0.0  # when the last reduction is done

    def launch(self, action: Action, now: float) -> None:
        """An UNSHARD, RESHARD or REDUCE_GRAD of the plan."""
        stage, op, _ = action
        if op is Op.UNSHARD:
            self._gather(stage, now)
        elif op is Op.REDUCE_GRAD and stage not in self._in_backward:
            self._free = self.reduced = max(now, self._free) + self._costs.reduction

    def compute(self, action: Action, start: float) -> float:
        """When a forward or backward is done that could start at `start`."""
        stage, op, microbatch = action
        duration = self._costs.of(action)
        if op is Op.F and microbatch == 0 and stage not in self._gathered:
            self._gather(stage, start)
        parts = self._gathered.get(stage)
        if parts:
            self._gathered[stage] = []
            if op is Op.B or len(parts) == 1:
                start = max(start, parts[-1])
            else:
                for part in parts:
                    start = max(start, part) + duration / len(parts)
                return start
        if op is Op.B:
            self._backwards[stage] = self._backwards.get(stage, 0) + 1
            if self._backwards[stage] == self._microbatches and self._reduces_in_backward(stage):
                return self._reduce(stage, start, duration)
        return start + duration

    def _buckets(self, stage: int) -> int:
        has_buckets = stage == 0 or self._is_sharded or self._waits.for_reductions
        return self._costs.buckets if has_buckets else 1

    def _gather(self, stage: int, now: float) -> None:
        buckets, begin = self._buckets(stage), max(now, self._free)
        self._gathered[stage] = [begin + self._costs.gather * (part + 1) / buckets for part in range(buckets)]
        self._free = self._gathered[stage][-1]

    def _reduces_in_backward(self, stage: int) -> bool:
        return self._is_sharded or self._waits.for_reductions or self._buckets(stage) > 1

    def _reduce(self, stage: int, start: float, duration: float) -> float:
        """When the last backward of a stage is done. Sharded gradients of one chunk at most wait for their reduction."""
        buckets, now = self._buckets(stage), start
        self._in_backward.add(stage)
        for _ in range(buckets):
            now += duration / buckets
            if self._is_sharded and len(self._unfinished) == buckets:
                now = max(now, self._unfinished.popleft())
            self._free = max(now, self._free) + self._costs.reduction / buckets
            self._unfinished.append(self._free)
        self.reduced = self._free
        return max(now, self._free) if self._waits.for_reductions else now

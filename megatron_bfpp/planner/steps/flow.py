"""When the last backward of a step ends, of stages that take different times: the longest path through its plan.

Micro-batches are alike, so the longest path enters a stage with the first micro-batch or with the last one, and moves
from the one to the other on the stages that are longest on its way. What is followed is one time for each of the two,
from stage to stage and through the ranks, of which each ends one chunk before it begins the next.

Exact where all forwards of the step come before its backwards (tested). On the last chunk of an eager order forwards
and backwards alternate, behind w = 2 (P-r-1) forwards on rank r; a rank that stands still between the two is not
followed there. Groups of fewer than all micro-batches are taken as one. How far off that is: docs/evidence/planner.md.
"""

from collections.abc import Sequence

from ...schedule.ir import SEND_WINDOW
from ..strategy import Strategy

__all__ = ["LEAD", "computing_time"]

# Micro-batches by which a rank gets ahead of the next one before a send of it waits: those under way at a time, and one
# whose receive is posted ahead.
LEAD = SEND_WINDOW + 1


def computing_time(
    s: Strategy, forward: Sequence[float], backward: Sequence[float], messages: list[float], lead: float = LEAD
) -> float:
    """Return the time from the first forward to the last backward.

    messages: of each edge of the ring. lead: inf where no rank waits for its sends.
    """
    flow = _Flow(s, forward, backward, messages, lead)
    last = s.pp * s.chunks - 1
    if s.schedule == "breadth-first-late":
        flow.through(range(last + 1), forward)
        flow.through(range(last, -1, -1), backward, is_back=True)
    else:
        flow.through(range(s.pp * (s.chunks - 1)), forward)
        flow.through_alternating()
        flow.through(range(last - s.pp, -1, -1), backward, is_back=True)
    return max(flow.free)


class _Flow:
    def __init__(
        self, s: Strategy, forward: Sequence[float], backward: Sequence[float], messages: list[float], lead: float
    ):
        self.s, self.forward, self.backward, self.messages, self.lead = s, forward, backward, messages, lead
        self.more = s.num_microbatches - 1  # micro-batches behind the first
        self.free = [0.0] * s.pp  # when each rank has ended what was followed so far
        self.first = self.last = 0.0  # when the first and the last micro-batch arrive at the next stage

    def _sent(self, stage: int, is_back: bool) -> float:
        """Return the time of the message behind a stage: none from the last forward to its backward."""
        if is_back:
            return self.messages[(stage - 1) % self.s.pp]
        return self.messages[stage % self.s.pp] if stage + 1 < self.s.pp * self.s.chunks else 0.0

    def through(self, stages: range, times: Sequence[float], is_back: bool = False) -> None:
        """Follow all micro-batches through stages in order, forwards or backwards alone."""
        for place, stage in enumerate(stages):
            rank, time, sent = stage % self.s.pp, times[stage], self._sent(stage, is_back)
            first = max(self.first, self.free[rank]) + time
            last = max(self.last + time, first + self.more * time)
            self.free[rank] = last
            self.first, self.last = first + sent, last + sent
            if place % self.s.pp == self.s.pp - 1:
                self._hold_up(stages[place + 1 - self.s.pp : place + 1], times, is_back)

    def _hold_up(self, chunk: range, times: Sequence[float], is_back: bool) -> None:
        """Let no rank of a chunk end much earlier than the next one: its sends wait for a receive."""
        for stage, behind in zip(chunk[-2::-1], chunk[:0:-1], strict=True):
            there = self.free[behind % self.s.pp] - self._sent(stage, is_back) - self.lead * times[behind]
            self.free[stage % self.s.pp] = max(self.free[stage % self.s.pp], there)

    def through_alternating(self) -> None:
        """Follow all micro-batches forth and back through the last chunk."""
        s, more = self.s, self.more
        begin = s.pp * (s.chunks - 1)
        ahead = [min(more, (1 if s.schedule == "1f1b" else 2) * (s.pp - rank - 1)) for rank in range(s.pp)]
        begins, forwards = [], []  # of each rank: when it begins, and when it has ended its forwards
        for rank in range(s.pp):
            f, b = self.forward[begin + rank], self.backward[begin + rank]
            begins.append(max(self.first, self.free[rank]))
            forwards.append(max(self.last + f, begins[rank] + (more + 1) * f + (more - ahead[rank]) * b))
            sent = self._sent(begin + rank, False)
            self.first, self.last = begins[rank] + f + sent, forwards[rank] + sent
        for rank in reversed(range(s.pp)):
            f, b = self.forward[begin + rank], self.backward[begin + rank]
            first = max(self.first, begins[rank] + (ahead[rank] + 1) * f) + b
            last = max(
                self.last + b, first + more * b + (more - ahead[rank]) * f, begins[rank] + (more + 1) * (f + b),
                forwards[rank] + (ahead[rank] + 1) * b,
            )  # fmt: skip
            self.free[rank] = last
            sent = self._sent(begin + rank, True)
            self.first, self.last = first + sent, last + sent

"""Transfers that share network cards: each of the n under way at a card gets an n-th of its bandwidth.

A transfer takes one or more places, for example the sending half of one card and the receiving half of another. It goes
as fast as its busiest place lets it; transfers of one queue go one after the other. That is processor sharing, which
switches with fair queues, and cards that serve their queue pairs in turn, approach for transfers of many packets.
Bandwidth that a transfer leaves unused at one place, because another holds it up, is not handed on.
"""

import heapq
from collections import Counter, deque
from collections.abc import Hashable
from typing import Any, NamedTuple

_ROUNDING = 1e-12  # part of a duration that rounding may leave


def sending(rank: int) -> tuple[int, str]:
    """Return the place that transfers take which leave the card of a rank."""
    return rank, "sending"


def receiving(rank: int) -> tuple[int, str]:
    """Return the place that transfers take which arrive at the card of a rank."""
    return rank, "receiving"


class Transfer(NamedTuple):
    key: Any
    size: float  # the time that it takes alone
    places: tuple[Hashable, ...]
    queue: Hashable  # its transfers go one at a time, in the order in which they were given


class Cards:
    """All places and what is under way there. Times are in one unit."""

    def __init__(self) -> None:
        self.now = 0.0
        # Each queue with its first transfer, which is under way or to come.
        self._queues: dict[Hashable, deque[tuple[float, Transfer]]] = {}
        self._to_come: list[tuple[float, int, Transfer]] = []  # heap: the first of each queue that has not begun
        self._left: dict[Transfer, float] = {}  # of each that is under way
        self._load: Counter[Hashable] = Counter()
        self._count = 0

    def begin(self, transfer: Transfer, start: float) -> None:
        """Begin a transfer at `start`; later if its queue is busy, now if that is past."""
        queue = self._queues.setdefault(transfer.queue, deque())
        queue.append((start, transfer))
        if len(queue) == 1:
            self._come(start, transfer)

    def next_end(self) -> float | None:
        """Return the earliest time at which a transfer can end; None if none is under way or to come."""
        ends = [*map(self._end, self._left), *(start + each.size for start, _, each in self._to_come)]
        return min(ends, default=None)

    def step(self, until: float = float("inf")) -> list[Any]:
        """Go on to the next end of transfers, at most to `until`. Return the keys of those that end there, if any."""
        while True:
            end = min(map(self._end, self._left), default=float("inf"))
            start = self._to_come[0][0] if self._to_come else float("inf")
            if min(start, end) > until or min(start, end) == float("inf"):
                if until < float("inf"):
                    self._go_to(until)
                return []
            if end <= start:
                return self._finish(end)
            self._go_to(start)
            transfer = heapq.heappop(self._to_come)[2]
            self._left[transfer] = transfer.size
            self._load.update(transfer.places)

    def _finish(self, end: float) -> list[Any]:
        done = [each for each in self._left if self._end(each) <= end + _ROUNDING * each.size]
        self._go_to(end)
        for each in done:
            del self._left[each]
            self._load.subtract(each.places)
            queue = self._queues[each.queue]
            queue.popleft()
            if queue:
                self._come(*queue[0])
        return [each.key for each in done]

    def _come(self, start: float, transfer: Transfer) -> None:
        self._count += 1
        heapq.heappush(self._to_come, (max(start, self.now), self._count, transfer))

    def _slowness(self, transfer: Transfer) -> int:
        return max(self._load[place] for place in transfer.places)

    def _end(self, transfer: Transfer) -> float:
        return self.now + self._left[transfer] * self._slowness(transfer)

    def _go_to(self, time: float) -> None:
        passed = max(0.0, time - self.now)
        for each in self._left:
            self._left[each] -= passed / self._slowness(each)
        self.now = max(self.now, time)

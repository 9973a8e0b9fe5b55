"""Transfers that share network cards: each of the n that are under way at a card has a n-th of it. Standard library only.

A transfer takes one or more places, for example the sending half of one card and the receiving half of another, and goes on as
fast as its busiest place lets it. That is processor sharing: what switches with fair queues, and cards that serve their queue
pairs in turn, come to for transfers of many packets. Bandwidth that a transfer leaves over at one place because another holds it
up is not handed on.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["Cards", "receiving", "sending"]

_EXACT = 1e-12  # of a duration: what rounding may leave of it


def sending(rank: int) -> tuple[int, str]:
    """The place of what leaves the card of a rank."""
    return rank, "sending"


def receiving(rank: int) -> tuple[int, str]:
    return rank, "receiving"


class Cards:
    """All places and what is under way there. Times and sizes in one unit: a size is the time that it takes alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self._later: list[tuple[float, int, Hashable, float, tuple[Hashable, ...]]] = []  # heap
        self._left: dict[Hashable, float] = {}  # of each transfer under way
        self._size: dict[Hashable, float] = {}
        self._places: dict[Hashable, tuple[Hashable, ...]] = {}
        self._load: Counter[Hashable] = Counter()
        self._count = 0

    def begin(self, key: Hashable, start: float, size: float, places: Sequence[Hashable]) -> None:
        """A transfer that begins at `start`; now where that is past."""
        self._count += 1
        heapq.heappush(self._later, (max(start, self.now), self._count, key, size, tuple(places)))

    def next_end(self) -> float | None:
        """When the next transfer would end if no other began; None where none is under way or to come."""
        ends = [self._end(key) for key in self._left]
        ends += [start + size for start, _, _, size, _ in self._later]
        return min(ends, default=None)

    def step(self, until: float = float("inf")) -> list[Hashable]:
        """Go on to the next end of transfers, at most to `until`; which end there, none where nothing does."""
        while True:
            end = min((self._end(key) for key in self._left), default=float("inf"))
            start = self._later[0][0] if self._later else float("inf")
            if min(start, end) > until or min(start, end) == float("inf"):
                if until < float("inf"):
                    self._go_to(until)
                return []
            if start < end:
                self._go_to(start)
                _, _, key, size, places = heapq.heappop(self._later)
                self._left[key] = self._size[key] = size
                self._places[key] = places
                self._load.update(places)
                continue
            done = [key for key in self._left if self._end(key) <= end + _EXACT * self._size[key]]
            self._go_to(end)
            for key in done:
                del self._left[key], self._size[key]
                self._load.subtract(self._places.pop(key))
            return done

    def _slowness(self, key: Hashable) -> int:
        return max(self._load[place] for place in self._places[key])

    def _end(self, key: Hashable) -> float:
        return self.now + self._left[key] * self._slowness(key)

    def _go_to(self, moment: float) -> None:
        passed = max(0.0, moment - self.now)
        for key in self._left:
            self._left[key] -= passed / self._slowness(key)
        self.now = max(self.now, moment)

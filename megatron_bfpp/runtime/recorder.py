"""When the actions of a step start and end on this rank, and what they wait for meanwhile.

A `Recorder` gives the executor its `span` and the messages their `waiting`; a step that is not recorded has neither and
pays nothing. Times are taken where the work is:
  - on CUDA by events on the current stream. They are read when the step is over; within it nothing is waited for.
  - on a CPU by the host's clock.
All end up on the host's clock, which `offset_to_first` compares between the ranks of a pipeline.

Not run on a GPU. There a wait is the time that the compute stream stands before the message, which is the exposed time.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..schedule.ir import Action
from .intervals import ACTION, DP, P2P, Interval

ROUND_TRIPS = 12  # the shortest counts: one that nothing has delayed


class Clock(Protocol):
    """A source of marks; what they mean is asked after the step."""

    def begin(self) -> int:
        """Before a step: how far the clock may be off from the host's, in nanoseconds."""

    def mark(self) -> Any:
        """Now."""

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        """After the step: the host's time of each mark."""


class HostClock:
    """time.perf_counter_ns."""

    mark = staticmethod(time.perf_counter_ns)

    def begin(self) -> int:
        return 0

    def nanoseconds(self, marks: list[int]) -> list[int]:
        return marks


class CudaClock:
    """Events on the current stream, after a first one whose time on the host is known."""

    def __init__(self) -> None:
        self._events: list[Any] = []  # made once, used again by every step
        self._used = 0
        self._base: Any = None
        self._base_ns = 0

    def begin(self) -> int:
        self._used = 0
        torch.cuda.synchronize()
        before = time.perf_counter_ns()
        self._base = self.mark()
        self._base.synchronize()
        after = time.perf_counter_ns()
        self._base_ns = (before + after) // 2
        return (after - before + 1) // 2

    def mark(self) -> Any:
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        torch.cuda.synchronize()
        return [self._base_ns + round(self._base.elapsed_time(mark) * 1e6) for mark in marks]  # elapsed_time: ms


class _Noting:
    """A context that notes when it was entered and left. A wait within another wait is a part of it."""

    __slots__ = ("_recorder", "_start", "_what")

    def __init__(self, recorder: Recorder, what: Action | str, kind: str):
        self._recorder, self._what = recorder, (what, kind)

    def __enter__(self) -> None:
        recorder = self._recorder
        if self._what[1] != ACTION:
            recorder.waits += 1
        self._start = recorder.clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        if self._what[1] != ACTION:
            recorder.waits -= 1
            if recorder.waits:
                return
        recorder.noted.append((self._what, self._start, recorder.clock.mark()))


class Recorder:
    """The intervals of one rank, step by step: `begin`, the step, `take`."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.noted: list[tuple[tuple[Action | str, str], Any, Any]] = []
        self.waits = 0  # under way

    def begin(self) -> int:
        """Before a step: forget what was noted; the clock's own error in nanoseconds."""
        self.noted.clear()
        return self.clock.begin()

    def span(self, action: Action) -> _Noting:
        """Around an action."""
        return _Noting(self, action, ACTION)

    def waiting(self, action: Action) -> _Noting:
        """Around the wait for a message, RECV_F or RECV_B, or for a send to be over."""
        return _Noting(self, action, P2P)

    def waiting_for_replicas(self, action: Action) -> _Noting:
        """Around the wait for a gather or a reduction of a chunk."""
        return _Noting(self, action, DP)

    def take(self) -> list[Interval]:
        """After the step: what was noted, in the order of its beginning."""
        times = self.clock.nanoseconds([mark for _, *marks in self.noted for mark in marks])
        pairs = zip(times[::2], times[1::2], strict=True)
        found = [Interval(str(what), kind, *pair) for ((what, kind), *_), pair in zip(self.noted, pairs, strict=True)]
        self.noted.clear()
        return sorted(found, key=lambda each: (each.start, -each.end))


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


def offset_to_first(group: dist.ProcessGroup) -> tuple[int, int]:
    """Collective over a gloo group: what to add to this rank's perf_counter_ns for the first rank's, and its error.

    A rank sends at t0, the first answers between t1 and t2, the answer is there at t3. The offset is
    ((t1 - t0) + (t2 - t3)) / 2, of the shortest round trip; it is wrong by no more than half the time that message and
    answer were under way, which is the error. Both in nanoseconds.
    """
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    best = 0, 0
    for other in range(1, group.size()):
        for trip in range(ROUND_TRIPS):
            if rank == 0:
                _answer(ranks[other], group)
            elif rank == other:
                offset, error = _ask(ranks[0], group)
                best = min(best, (offset, error), key=lambda each: each[1]) if trip else (offset, error)
    return best


def _answer(source: int, group: dist.ProcessGroup) -> None:
    times = torch.zeros(2, dtype=torch.int64)
    dist.recv(times[:1], source, group=group)
    times[0] = time.perf_counter_ns()
    times[1] = time.perf_counter_ns()
    dist.send(times, source, group=group)


def _ask(target: int, group: dist.ProcessGroup) -> tuple[int, int]:
    times = torch.zeros(2, dtype=torch.int64)
    t0 = time.perf_counter_ns()
    dist.send(times[:1], target, group=group)
    dist.recv(times, target, group=group)
    t3 = time.perf_counter_ns()
    t1, t2 = times.tolist()
    return ((t1 - t0) + (t2 - t3)) // 2, ((t3 - t0) - (t2 - t1) + 1) // 2

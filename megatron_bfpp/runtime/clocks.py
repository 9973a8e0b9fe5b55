"""Clocks of a recorded step, and how far the host clocks of the ranks of a pipeline are apart.

Times are taken where the work is:
  - on CUDA by events on the current stream. They are read when the step is over; within it nothing is waited for.
  - on a CPU by the host's clock.
All end up on the host's clock, which `offset_to_first` compares between the ranks of a pipeline.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

ROUND_TRIPS = 12  # the shortest counts: one that nothing has delayed


class HostClock:
    """Marks times with time.perf_counter_ns."""

    mark = staticmethod(time.perf_counter_ns)

    def begin(self) -> int:
        return 0

    def nanoseconds(self, marks: list[int]) -> list[int]:
        return marks


class CudaClock:
    """Marks times with events on the current stream, after a first one whose time on the host is known."""

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
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        torch.cuda.synchronize()
        return [self._base_ns + round(self._base.elapsed_time(mark) * 1e6) for mark in marks]  # elapsed_time: ms


def clock_of(device: torch.device) -> HostClock | CudaClock:
    return CudaClock() if device.type == "cuda" else HostClock()


def offset_to_first(group: dist.ProcessGroup) -> tuple[int, int]:
    """Return what to add to this rank's perf_counter_ns to get the first rank's, and the error; collective, over gloo.

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

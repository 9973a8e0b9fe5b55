"""Notes when the actions of a step start and end on this rank, and what they wait for meanwhile.

A `Recorder` gives the executor its `span` and the messages their `waiting`; a step that is not recorded has neither and
pays nothing. Its clock (runtime/clocks.py) marks times where the work is, on the GPU or on the host.

Not run on a GPU. There a wait is the time that the compute stream stands before the message, which is the exposed time.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from ..schedule.ir import Action
from .intervals import ACTION, DP, P2P, Interval


class Clock(Protocol):
    """A source of marks; what they mean is asked after the step."""

    def begin(self) -> int:
        """Before a step: how far the clock may be off from the host's, in nanoseconds."""

    def mark(self) -> Any:
        """Now."""

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        """After the step: the host's time of each mark."""


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

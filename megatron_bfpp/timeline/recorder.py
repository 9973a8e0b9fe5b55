"""Notes when the actions of a step start and end on this rank, and what they wait for meanwhile.

A `Recorder` gives the executor its `span` and the messages their `waiting`; a step that is not recorded has neither and
pays nothing. Its clock (runtime/clocks.py) marks times where the work is, on the GPU or on the host.

Not run on a GPU. There a wait is the time that the compute stream stands before the message, which is the exposed time.
"""

from typing import Any, Protocol

from ..schedule.ir import Action
from .intervals import ACTION, DP, P2P, Interval


class Clock(Protocol):
    """A source of marks, which become times after the step."""

    def begin(self) -> int:
        """Prepare for a step; return how far the clock may be off from the host's, in nanoseconds."""

    def mark(self) -> Any:
        """Mark now."""

    def nanoseconds(self, marks: list[Any]) -> list[int]:
        """Return the host's time of each mark, after the step."""


class _Noting:
    """A context that notes when it was entered and left. A wait within another wait is a part of it."""

    __slots__ = ("_action", "_kind", "_recorder", "_start")

    def __init__(self, recorder: "Recorder", action: Action, kind: str):
        self._recorder, self._action, self._kind = recorder, action, kind

    def __enter__(self) -> None:
        self._recorder.waits += self._kind != ACTION
        self._start = self._recorder.clock.mark()

    def __exit__(self, *_: object) -> None:
        recorder = self._recorder
        if self._kind != ACTION:
            recorder.waits -= 1
            if recorder.waits:
                return
        recorder.noted.append((self._action, self._kind, self._start, recorder.clock.mark()))


class Recorder:
    """The intervals of one rank, step by step: `begin`, the step, `take`."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.noted: list[tuple[Action, str, Any, Any]] = []
        self.waits = 0  # under way

    def begin(self) -> int:
        """Forget what was noted, before a step; return the clock's own error in nanoseconds."""
        self.noted.clear()
        return self.clock.begin()

    def span(self, action: Action) -> _Noting:
        """Return the context to run an action in."""
        return _Noting(self, action, ACTION)

    def waiting(self, action: Action) -> _Noting:
        """Return the context of a wait for a message, RECV_F or RECV_B, or for the end of a send."""
        return _Noting(self, action, P2P)

    def waiting_for_replicas(self, action: Action) -> _Noting:
        """Return the context of a wait for a gather or a reduction of a chunk."""
        return _Noting(self, action, DP)

    def take(self) -> list[Interval]:
        """Return what was noted in the step, in the order of its beginning, and forget it."""
        times = iter(self.clock.nanoseconds([mark for *_, start, end in self.noted for mark in (start, end)]))
        found = [Interval(action, kind, next(times), next(times)) for action, kind, *_ in self.noted]
        self.noted.clear()
        return sorted(found, key=lambda each: (each.start, -each.end))

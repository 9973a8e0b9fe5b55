"""What this process is doing, for whoever has to say so when it does not come to an end: the watchdog.

The executor and the messages note each action and each wait, two attributes and a clock each (0.2 microseconds). Another
thread reads them at any time; what it reads may be one action old, never torn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..schedule.ir import Action, Op, PipelineShape
from ..schedule.lower import peer


class Status(NamedTuple):
    """What one rank says of itself. Travels as JSON."""

    rank: int
    pp_rank: int | None  # None before its first step
    host: str
    step: str  # "step 12"; "evaluation"; "" before the first
    doing: str | None  # an action, or words; None between steps
    waiting: str | None  # the message that it waits for
    peer_pp_rank: int | None  # who sends or takes that message
    peer_rank: int | None
    seconds: float  # since it began that
    ended: str = ""  # why it ends by itself; "" for a rank that another one takes along

    def __str__(self) -> str:
        where = "" if self.pp_rank is None else f" (pp_rank {self.pp_rank})"
        return f"rank {self.rank}{where} on {self.host}: {self.what()}"

    def what(self) -> str:
        """Without who it is."""
        text = self.step or "before the first step"
        if self.doing is not None:
            text += f", in {self.doing}"
        if self.waiting is not None:
            other = f"pp_rank {self.peer_pp_rank} (rank {self.peer_rank})"
            verb = "for it to be taken by" if "SEND" in self.waiting else "from"
            text += f", waiting for {self.waiting} {verb} {other}"
        if self.doing is not None:
            text += f" since {self.seconds:.1f} s"
        return text


class Activity:
    """One object per process."""

    def __init__(self) -> None:
        self.step = ""
        self.doing: Action | str | None = None
        self.waiting: Action | None = None
        self.since = time.monotonic()
        self.is_timed = False  # whether `doing` must come to an end
        self._shape: PipelineShape | None = None
        self._ranks: Sequence[int] = []  # global, by pp_rank
        self._pp_rank: int | None = None
        self._launched: list[tuple[Action, Any]] = []

    def begin_step(self, step: str, shape: PipelineShape, ranks: Sequence[int], pp_rank: int | None) -> None:
        """A step of a pipeline whose ranks have the global ranks `ranks`."""
        self.step, self._shape, self._ranks, self._pp_rank = step, shape, ranks, pp_rank
        self._launched = []
        self.begin("the begin of the step")

    def begin(self, what: Action | str) -> None:
        """From here on the process is in `what`, until the next call."""
        self.doing, self.waiting, self.since, self.is_timed = what, None, time.monotonic(), True

    def wait(self, action: Action) -> None:
        """Within what was begun: from here on it waits for a message, until `waited`."""
        self.waiting, self.since = action, time.monotonic()

    def waited(self) -> None:
        self.waiting = None

    def launched(self, action: Action, handle: Any) -> None:
        """A message whose wait() returned before it arrived, as on CUDA: its handle knows when it has."""
        self._launched.append((action, handle))

    def end(self) -> None:
        """Between steps: nothing that would have to come to an end soon."""
        self.doing, self.waiting, self.is_timed = None, None, False
        self._launched = []

    def fail(self) -> None:
        """An error was raised: what was begun goes no further, and is kept for the report."""
        self.is_timed = False

    def status(self, rank: int, host: str, ended: str = "") -> Status:
        """Now. May be called from another thread."""
        doing, waiting, since = self.doing, self.waiting or self._late_on_device(), self.since
        other, pp_rank = None, self._pp_rank
        if waiting is not None and self._shape is not None and (found := peer(waiting, self._shape)) is not None:
            other = self._shape.rank_of(found.stage)
        return Status(
            rank, pp_rank, host, self.step, None if doing is None else str(doing), None if waiting is None else str(waiting),
            other, None if other is None else self._ranks[other], time.monotonic() - since, ended,
        )  # fmt: skip

    def _late_on_device(self) -> Action | None:
        """The first message that the host has gone past and the device has not. Not run on a GPU."""
        for action, handle in list(self._launched):
            if action.op in (Op.RECV_F, Op.RECV_B) and not handle.is_completed():
                return action
        return None

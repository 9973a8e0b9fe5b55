"""Notes what this process is doing, so that the watchdog can report it when a step does not end.

The executor and the messages note each action and each wait: two attributes and a clock, 0.2 microseconds. Another
thread reads them at any time; its answer may be one action old, never torn.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..schedule.ir import Action, PipelineShape, peer


class Status(NamedTuple):
    """A rank's report of what it is doing. It travels as JSON."""

    rank: int
    pp_rank: int | None  # None before its first step
    host: str
    step: str  # "step 12"; "evaluation"; "" before the first
    doing: str | None  # an action, or words; None between steps
    waiting: str | None  # the message that it waits for
    peer_pp_rank: int | None  # the other end of that message
    peer_rank: int | None
    seconds: float  # since it began this
    ended: str = ""  # its own reason to end; "" for a rank that ends because another one does

    def __str__(self) -> str:
        where = "" if self.pp_rank is None else f" (pp_rank {self.pp_rank})"
        return f"rank {self.rank}{where} on {self.host}: {self.what()}"

    def what(self) -> str:
        """Return the report without the rank's name."""
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
    """The current action and wait of this process. Make one object per process."""

    def __init__(self) -> None:
        self.step = ""
        self.doing: Action | str | None = None
        self.waiting: Action | None = None
        self.since = time.monotonic()
        self.is_timed = False  # whether `doing` must end in time
        self._shape: PipelineShape | None = None
        self._ranks: Sequence[int] = []  # global, by pp_rank
        self._pp_rank: int | None = None
        self._launched: deque[tuple[Action, Any]] = deque()

    def begin_step(self, step: str, shape: PipelineShape, ranks: Sequence[int], pp_rank: int | None) -> None:
        """Begin a step. ranks: the global ranks of the pipeline, by pp_rank; none if they are unknown."""
        self.step, self._shape, self._ranks, self._pp_rank = step, shape, ranks, pp_rank
        self._launched = deque()
        self.begin("the begin of the step")

    def begin(self, what: Action | str) -> None:
        """Note that the process is in `what` from here on, until the next call."""
        self.doing, self.waiting, self.since, self.is_timed = what, None, time.monotonic(), True

    def wait(self, action: Action) -> None:
        """Note that it waits for a message from here on, until `waiting` is None again."""
        self.waiting, self.since = action, time.monotonic()

    def launched(self, action: Action, event: Any) -> None:
        """Note a receive that the compute stream has yet to reach, as on CUDA. event: recorded there behind it."""
        launched = self._launched
        while launched and launched[0][1].query():  # a stream is in order
            launched.popleft()
        launched.append((action, event))

    def end(self) -> None:
        """Note that no step runs: nothing is timed."""
        self.doing, self.waiting, self.is_timed = None, None, False
        self._launched = deque()

    def fail(self) -> None:
        """Note that an error was raised: nothing is timed any more, and the current action is kept for the report."""
        self.is_timed = False

    def status(self, rank: int, host: str, ended: str = "") -> Status:
        """Return the report of this moment. Another thread may call it."""
        doing, waiting, since = self.doing, self.waiting or self._late_on_device(), self.since
        other, pp_rank = None, self._pp_rank
        if waiting is not None and self._shape is not None and (found := peer(waiting, self._shape)) is not None:
            other = self._shape.rank_of(found.stage)
        return Status(
            rank, pp_rank, host, self.step, None if doing is None else str(doing),
            None if waiting is None else str(waiting), other, None if other is None else self._ranks[other],
            time.monotonic() - since, ended,
        )  # fmt: skip

    def _late_on_device(self) -> Action | None:
        """Return the first receive that the host has passed and the device has not. Not run on a GPU."""
        return next((action for action, event in list(self._launched) if not event.query()), None)

"""Predict a step from its plan: the very actions that the executor runs, with the time that messages and reductions take.

`simulate` knows dependencies only. Here every send, receive, gather and reduction of the plan counts where it stands:
  - A message begins when it is sent, its receive is posted and the message before it has left the channel; it takes the
    channel for `transfer` and arrives `hop` later.
  - A compute action waits for its message, for the last gather of its chunk, and for the sends that its rank launched
    SEND_WINDOW or more compute actions earlier, as the executor does.
  - Gathers and reductions of a rank run one after the other, beside everything else (collectives.py); the step ends with the
    last of them.
Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .check import SEND_WINDOW
from .collectives import OURS, UNIT, Collectives, Costs, Waits
from .ir import COMPUTE, RECEIVES, SENDS, Action, Op, PipelineShape, Schedule
from .lower import channel, peer
from .sharding import is_sharded
from .simulate import Key, ScheduleError, Span, Timeline

__all__ = ["Costs", "Prediction", "Waits", "replay"]

_MESSAGE = {Op.F: Op.RECV_F, Op.B: Op.RECV_B}


@dataclass(frozen=True)
class Prediction(Timeline):
    """A timeline of a plan; also when the last reduction of each rank ends."""

    reduced: list[float] = field(default_factory=list)

    @property
    def step_time(self) -> float:
        return max(super().step_time, *self.reduced)

    @property
    def exposed_reduction(self) -> float:
        """How much of the step stands behind the last backward."""
        return self.step_time - super().step_time

    def waiting(self) -> list[float]:
        """Per rank, the time before its last action in which it does not compute."""
        return [spans[-1].end - sum(span.end - span.start for span in spans) for spans in self.spans]


def replay(plan: Schedule, shape: PipelineShape, costs: Costs = UNIT, waits: Waits = OURS) -> Prediction:
    """Run a lowered plan; ScheduleError where no rank can go on (`check` says why)."""
    return _Replay(plan, shape, costs, waits).to_the_end()


@dataclass(eq=False, slots=True)
class _Channel:
    """The messages of one directed channel, in order."""

    sent: deque[float] = field(default_factory=deque)  # launched, not begun: when
    posted: deque[tuple[float, Key]] = field(default_factory=deque)  # receives not begun: when, and of what
    senders: deque[Key] = field(default_factory=deque)
    free: float = 0.0
    ranks: tuple[int, ...] = ()


class _Replay:
    def __init__(self, plan: Schedule, shape: PipelineShape, costs: Costs, waits: Waits):
        self.plan, self.shape, self.costs = plan, shape, costs
        self.for_sends, self.for_forward_sends = waits.for_sends, waits.for_forward_sends
        stages = range(shape.num_stages)
        self.durations = {op: [costs.of(Action(stage, op)) for stage in stages] for op in COMPUTE}
        size = shape.pp_size
        self.position, self.clock = [0] * size, [0.0] * size
        self.spans: list[list[Span]] = [[] for _ in range(size)]
        self.arrived: dict[Key, float] = {}  # receive -> when its message is there
        self.left: dict[Key, float] = {}  # send -> when its tensor may be reused
        self.sent: list[deque[list[Key]]] = [deque([[]], SEND_WINDOW) for _ in range(size)]
        sharded = is_sharded(plan)
        self.collectives = [Collectives(costs, waits, sharded, shape.num_microbatches) for _ in range(size)]
        self.has_collectives = costs.gather > 0 or costs.reduction > 0
        self.ready = list(range(size))
        self.blocked = [False] * size
        self.channels = dict(self._channels())

    def _channels(self) -> Iterator[tuple[tuple[int, Op], _Channel]]:
        """The channel of each kind of message of each stage, the same for both ends."""
        made: dict[object, _Channel] = {}
        for stage in range(self.shape.num_stages):
            for op in SENDS:
                send = Action(stage, op, 0)
                received = peer(send, self.shape)
                if received is not None:
                    key = channel(send, self.shape)
                    found = made.setdefault(key, _Channel(ranks=key[1:]))
                    yield (stage, op), found
                    yield (received.stage, received.op), found

    def to_the_end(self) -> Prediction:
        while self.ready:
            rank = self.ready.pop()
            self.blocked[rank] = False
            self._advance(rank)
        stuck = [rank for rank, actions in enumerate(self.plan) if self.position[rank] < len(actions)]
        if stuck:
            where = ", ".join(f"pp_rank {rank} at {self.plan[rank][self.position[rank]]}" for rank in stuck)
            raise ScheduleError(f"no rank can run its next action: {where}")
        return Prediction(self.shape, self.spans, [each.reduced for each in self.collectives])

    def _advance(self, rank: int) -> None:
        actions, now, window, collectives = self.plan[rank], self.clock[rank], self.sent[rank], self.collectives[rank]
        for position in range(self.position[rank], len(actions)):
            action = actions[position]
            op = action.op
            if op in COMPUTE:
                start = self._start(action, now, window)
                if start is None:
                    self.position[rank], self.clock[rank], self.blocked[rank] = position, now, True
                    return
                now = collectives.compute(action, start) if self.has_collectives else start + self.durations[op][action.stage]
                self.spans[rank].append(Span(action, start, now))
                window.append([])
            elif op in SENDS:
                queue = self.channels[action.stage, op]
                queue.sent.append(now)
                queue.senders.append(action)
                window[-1].append(action)
                self._begin(queue)
            elif op in RECEIVES:
                queue = self.channels[action.stage, op]
                queue.posted.append((now, action))
                self._begin(queue)
            else:
                collectives.launch(action, now)
        self.position[rank], self.clock[rank] = len(actions), now

    def _start(self, action: Action, now: float, window: deque[list[Key]]) -> float | None:
        """When a compute action of a rank that is free from `now` on starts; None while that is not known."""
        stage, op, microbatch = action
        message = _MESSAGE[op]
        if (stage, message) in self.channels:
            arrival = self.arrived.get((stage, message, microbatch))
            if arrival is None:
                return None
            now = max(now, arrival)
        due = window[0] if self.for_sends and len(window) == SEND_WINDOW else []
        if self.for_forward_sends:
            due = due + [send for send in window[-1] if send[1] is Op.SEND_F]
        for send in due:
            left = self.left.get(send)
            if left is None:
                return None
            now = max(now, left)
        return now

    def _begin(self, queue: _Channel) -> None:
        while queue.sent and queue.posted:
            posted, receive = queue.posted.popleft()
            begin = max(queue.sent.popleft(), posted, queue.free)
            queue.free = begin + self.costs.transfer
            self.left[queue.senders.popleft()] = queue.free
            self.arrived[receive] = queue.free + self.costs.hop
            for rank in queue.ranks:
                if self.blocked[rank]:
                    self.blocked[rank] = False
                    self.ready.append(rank)

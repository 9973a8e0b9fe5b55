"""Predict a step from its plan: the actions that the executor runs, with the time of messages and collectives.

`simulate` knows dependencies only. Here every send, receive, gather and reduction of the plan counts where it stands:
  - A message begins when it is sent, its receive is posted and the message before it has left the channel; it takes the
    channel for `transfer` and arrives `hop` later. Both may differ between edges of the ring, within and across nodes.
  - A compute action waits for its message, for the last gather of its chunk, and for the sends that its rank launched
    SEND_WINDOW or more compute actions earlier, as the executor does; a W waits for nothing.
  - Gathers and reductions of a rank run one after the other, beside everything else (collectives.py); the step ends
    with the last of them.
  - With one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) what a rank launches starts in the order of launch: a send
    or receive holds back all behind it until the one before it on its channel is over, at both ends, and a collective
    until the one before it is.
  - With a shared card messages and collectives slow each other down (cards.py). The end of a transfer then depends on
    what begins meanwhile: ranks run as far as they can without it, then the cards go on to the next end.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ..console.errors import UserError
from .cards import Cards, Transfer, receiving, sending
from .collectives import Collective, Collectives
from .costs import OURS, UNIT, Costs, Waits, at
from .ir import (
    COMPUTE,
    MESSAGE,
    PASSES,
    RECEIVES,
    SEND_WINDOW,
    SENDS,
    Action,
    Channel,
    Op,
    PipelineShape,
    Schedule,
    channel,
    peer,
)
from .sharding import is_sharded
from .simulate import Key, ScheduleError, Span, Timeline

MESSAGES = SENDS | RECEIVES


class Message(NamedTuple):
    """A send with its receive, and the times of both."""

    send: Action
    receive: Action
    sent: float  # launch of the send
    posted: float  # launch of the receive
    left: float  # the tensor may be reused
    arrived: float  # `hop` later


@dataclass(frozen=True)
class Prediction(Timeline):
    """A timeline of a plan, with what was under way between the ranks."""

    reduced: list[float] = field(default_factory=list)  # [pp_rank], the end of the last reduction
    messages: list[Message] = field(default_factory=list)
    collectives: list[list[tuple[Action, Collective]]] = field(default_factory=list)  # [pp_rank]

    @property
    def step_time(self) -> float:
        return max(super().step_time, *self.reduced)

    @property
    def exposed_reduction(self) -> float:
        """Return the part of the step that comes after the last backward."""
        return self.step_time - super().step_time

    def waiting(self) -> list[float]:
        """Return, per rank, the time before its last action in which it does not compute."""
        return [spans[-1].end - sum(span.end - span.start for span in spans) for spans in self.spans]


def replay(
    plan: Schedule, shape: PipelineShape, costs: Costs = UNIT, waits: Waits = OURS, connections: int | None = None
) -> Prediction:
    """Run a lowered plan; raise ScheduleError if no rank can go on (`check` gives the reason).

    connections: hardware queues of a GPU, CUDA_DEVICE_MAX_CONNECTIONS. 1: one for all. More, or None: as many as
        streams. (Megatron's default on GPUs before Blackwell is 1 with tensor or context parallelism.)
    """
    if connections is not None and connections < 1:
        raise UserError(f"connections is {connections}; a GPU has 1 hardware queue or more")
    return _Replay(plan, shape, costs, waits, connections == 1).to_the_end()


@dataclass(eq=False, slots=True)
class _Channel:
    """The messages of one directed channel, in order."""

    ranks: tuple[int, int]  # sender, receiver
    hop: float
    transfer: float
    is_shared: bool
    sent: deque[tuple[float, Action]] = field(default_factory=deque)  # launched, not begun
    posted: deque[tuple[float, Action]] = field(default_factory=deque)  # receives not begun
    launched: dict[Op, int] = field(default_factory=lambda: dict.fromkeys(Op, 0))  # sends, receives
    over: list[float] = field(default_factory=list)  # when each message arrived
    free: float = 0.0


class _Replay:
    def __init__(self, plan: Schedule, shape: PipelineShape, costs: Costs, waits: Waits, one_queue: bool):
        self.plan, self.shape, self.costs, self.one_queue = plan, shape, costs, one_queue
        self.for_sends, self.for_forward_sends = waits.for_sends, waits.for_forward_sends
        stages = range(shape.num_stages)
        self.durations = {op: [costs.of(Action(stage, op)) for stage in stages] for op in COMPUTE}
        size = shape.pp_size
        self.position, self.clock = [0] * size, [0.0] * size
        self.spans: list[list[Span]] = [[] for _ in range(size)]
        self.arrived: dict[Key, float] = {}  # receive -> when its message is there
        self.left: dict[Key, float] = {}  # send -> when its tensor may be reused
        self.messages: list[Message] = []
        self.sent: list[deque[list[Key]]] = [deque([[]], SEND_WINDOW) for _ in range(size)]
        is_shared = costs.shared_card if isinstance(costs.shared_card, bool) else any(costs.shared_card)
        self.cards = Cards() if is_shared else None
        carry = None if self.cards is None else self._carry_collective
        self.collectives = [
            Collectives(costs, waits, is_sharded(plan), shape.num_microbatches, carry and partial(carry, rank))
            for rank in range(size)
        ]
        self.has_collectives = costs.gather > 0 or costs.reduction > 0
        self.ready = list(range(size))
        self.blocked = [False] * size
        self.channels = dict(self._channels())

    def _channels(self) -> Iterator[tuple[tuple[int, Op], _Channel]]:
        """Yield the channel of each kind of message of each stage, the same for both ends."""
        made: dict[Channel, _Channel] = {}
        costs, size = self.costs, self.shape.pp_size
        for stage in range(self.shape.num_stages):
            for op in SENDS:
                send = Action(stage, op, 0)
                received = peer(send, self.shape)
                if received is not None:
                    key = channel(send, self.shape)
                    edge = key[1] if op is Op.SEND_F else key[2]
                    shared = bool(at(costs.shared_card, edge % size))
                    new = _Channel(key[1:], at(costs.hop, edge), at(costs.transfer, edge), shared)
                    for end in (send, received):
                        yield end[:2], made.setdefault(key, new)

    def to_the_end(self) -> Prediction:
        self._go_on()
        while self.cards is not None and (done := self.cards.step()):
            for then in done:
                then(self.cards.now)
            self._go_on()
        stuck = [rank for rank, actions in enumerate(self.plan) if self.position[rank] < len(actions)]
        if stuck:
            where = ", ".join(f"pp_rank {rank} at {self.plan[rank][self.position[rank]]}" for rank in stuck)
            raise ScheduleError(f"no rank can run its next action: {where}")
        logs = [each.log for each in self.collectives]
        reduced = [each.reduced for each in self.collectives]
        return Prediction(self.shape, self.spans, reduced=reduced, messages=self.messages, collectives=logs)

    def _go_on(self) -> None:
        """Run all ranks up to actions whose start is not known yet."""
        while self.ready:
            rank = self.ready.pop()
            self.blocked[rank] = False
            self._advance(rank)

    def _advance(self, rank: int) -> None:
        actions, now, window, collectives = self.plan[rank], self.clock[rank], self.sent[rank], self.collectives[rank]
        for position in range(self.position[rank], len(actions)):
            action = actions[position]
            op = action.op
            start = self._started(rank, action, now) if self.one_queue else now
            if start is not None and op in PASSES:
                start = self._start(action, start, window)
            if start is None:
                times = None
            elif op not in COMPUTE:
                times = start, start
            elif self.has_collectives:
                times = collectives.compute(action, start)
            else:
                times = start, start + self.durations[op][action.stage]
            if times is None:
                self.position[rank], self.clock[rank], self.blocked[rank] = position, now, True
                return
            now = times[1]
            if op in COMPUTE:
                self.spans[rank].append(Span(action, *times))
                if op is not Op.W:
                    window.append([])
            elif op in MESSAGES:
                queue = self.channels[action.stage, op]
                queue.launched[op] += 1
                (queue.sent if op in SENDS else queue.posted).append((now, action))
                if op in SENDS:
                    window[-1].append(action)
                self._begin(queue)
            else:
                collectives.launch(action, now)
        self.position[rank], self.clock[rank] = len(actions), now

    def _started(self, rank: int, action: Action, now: float) -> float | None:
        """Return when the one queue of a rank comes to `action`; None while that is not known.

        By then the last collective has started, thus the one before it is over; a message also needs the end of the one
        before it on its channel.
        """
        log = self.collectives[rank].log
        if len(log) > 1:
            end = log[-2][1].end
            if end is None:
                return None
            now = max(now, end)
        if action.op in MESSAGES:
            queue = self.channels[action.stage, action.op]
            before = queue.launched[action.op] - 1
            if before >= len(queue.over):
                return None
            if before >= 0:
                now = max(now, queue.over[before])
        return now

    def _start(self, action: Action, now: float, window: deque[list[Key]]) -> float | None:
        """Return the start of a compute action of a rank that is free from `now` on; None while that is not known."""
        stage, op, microbatch = action
        message = MESSAGE[op]
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
            sent, posted = queue.sent.popleft(), queue.posted.popleft()
            begin = max(sent[0], posted[0])
            if self.cards is None or not queue.is_shared or not queue.transfer:
                self._arrive(queue, sent, posted, max(begin, queue.free) + queue.transfer)
            else:
                sender, receiver = queue.ranks
                self._carry(partial(self._arrive, queue, sent, posted), begin, queue.transfer, sender, receiver, queue)

    def _arrive(self, queue: _Channel, sent: tuple[float, Action], posted: tuple[float, Action], left: float) -> None:
        queue.free, arrived = left, left + queue.hop
        queue.over.append(arrived)
        self.left[sent[1]], self.arrived[posted[1]] = left, arrived
        self.messages.append(Message(sent[1], posted[1], sent[0], posted[0], left, arrived))
        self._wake(queue.ranks)

    def _wake(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            if self.blocked[rank]:
                self.blocked[rank] = False
                self.ready.append(rank)

    def _carry(
        self, then: Callable[[float], None], start: float, size: float, sender: int, receiver: int, queue: Hashable
    ) -> None:
        """Put a transfer on shared cards. then: called with the time of its end."""
        assert self.cards is not None, "no card is shared"
        self.cards.begin(Transfer(then, size, (sending(sender), receiving(receiver)), queue), start)

    def _carry_collective(self, rank: int, collective: Collective) -> None:
        """Put a collective on the card of a rank, in both directions as in a ring."""

        def end(now: float) -> None:
            collective.end = now
            self._wake((rank,))

        self._carry(end, collective.launched, collective.duration, rank, rank, rank)

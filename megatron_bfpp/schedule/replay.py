"""Predict a step from its plan: the very actions that the executor runs, with the time that messages and reductions take.

`simulate` knows dependencies only. Here every send, receive, gather and reduction of the plan counts where it stands:
  - A message begins when it is sent, its receive is posted and the message before it has left the channel; it takes the
    channel for `transfer` and arrives `hop` later.
  - A compute action waits for its message, for the gather of its chunk, and for the sends that its rank launched SEND_WINDOW
    or more compute actions earlier, as the executor does.
  - Gathers and reductions of a rank run one after the other, beside everything else; the step ends with the last of them.
    A chunk whose gather does not stand in the plan is gathered when its first forward would start, as Megatron's hooks do.
Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .check import SEND_WINDOW
from .ir import COMPUTE, RECEIVES, SENDS, Action, Op, PipelineShape, Schedule
from .lower import channel, peer
from .simulate import Key, ScheduleError, Span, Timeline

_MESSAGE = {Op.F: Op.RECV_F, Op.B: Op.RECV_B}


@dataclass(frozen=True)
class Costs:
    """Durations, in one unit of the caller's choice. forward, backward: of every stage, or one for each stage in order."""

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    hop: float = 0.0  # of a message between two ranks, beside its transfer
    transfer: float = 0.0  # of a message: size / bandwidth
    gather: float = 0.0  # of the parameters of a chunk (UNSHARD)
    reduction: float = 0.0  # of the gradients of a chunk (REDUCE_GRAD)
    # The first rank's first chunk is reduced in so many parts during its last backward, and gathered in as many during its first forward.
    buckets: int = 1

    def of(self, action: Action) -> float:
        """Of a compute action."""
        cost = self.forward if action.op is Op.F else self.backward
        return cost if isinstance(cost, int | float) else cost[action.stage]

    @staticmethod
    def reduced(start: float, end: float, free: float, reduction: float, buckets: int) -> float:
        """When the reduction of what a backward from start to end makes, bucket by bucket, is done on a network free from `free` on."""
        for bucket in range(1, buckets + 1):
            free = max(free, start + (end - start) * bucket / buckets) + reduction / buckets
        return free

    @staticmethod
    def gathered(start: float, forward: float, parts: list[float]) -> float:
        """When a forward is done whose parts wait for parts of the parameters."""
        for part in parts:
            start = max(start, part) + forward / len(parts)
        return start


@dataclass(frozen=True)
class Waits:
    """What a runtime waits for, beside what its actions need. The default is this plugin's executor."""

    for_sends: bool = True  # those launched SEND_WINDOW or more compute actions ago
    for_forward_sends: bool = False  # each send of an output, before the next action
    # In the last backward of a stage, for its reduction and gather (an all-reduce), which it launches then, bucket by bucket.
    for_reductions: bool = False


OURS = Waits()


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


def replay(plan: Schedule, shape: PipelineShape, costs: Costs = Costs(), waits: Waits = OURS) -> Prediction:
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
        self.plan, self.shape, self.costs, self.waits = plan, shape, costs, waits
        size = shape.pp_size
        self.position, self.clock = [0] * size, [0.0] * size
        self.spans: list[list[Span]] = [[] for _ in range(size)]
        self.arrived: dict[Key, float] = {}  # receive -> when its message is there
        self.left: dict[Key, float] = {}  # send -> when its tensor may be reused
        self.sent: list[deque[list[Key]]] = [deque([[]], SEND_WINDOW) for _ in range(size)]
        self.backwards = dict.fromkeys(range(shape.num_stages), 0)
        self.gathered: dict[int, list[float]] = {}  # stage -> when each bucket is there
        self.collectives = [0.0] * size  # when the rank's data-parallel network is free
        self.reduced = [0.0] * size
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
        return Prediction(self.shape, self.spans, self.reduced)

    def _advance(self, rank: int) -> None:
        actions, now, window = self.plan[rank], self.clock[rank], self.sent[rank]
        for position in range(self.position[rank], len(actions)):
            action = actions[position]
            op = action.op
            if op in COMPUTE:
                start = self._start(action, now, window)
                if start is None:
                    self.position[rank], self.clock[rank], self.blocked[rank] = position, now, True
                    return
                now = start + self.costs.of(action)
                if op is Op.F and action.microbatch == 0 and self.costs.gather:
                    now = self._after_gather(action, rank, start)
                elif op is Op.B and self.waits.for_reductions:
                    now = self._after_reduction(action, rank, start, now)
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
                self._collective(action, rank, now)
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
        due = window[0] if self.waits.for_sends and len(window) == SEND_WINDOW else []
        if self.waits.for_forward_sends:
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

    def _buckets(self, stage: int) -> int:
        return self.costs.buckets if stage == 0 else 1

    def _gather(self, stage: int, rank: int, now: float) -> None:
        buckets = self._buckets(stage)
        begin = max(now, self.collectives[rank])
        self.gathered[stage] = [begin + self.costs.gather * (part + 1) / buckets for part in range(buckets)]
        self.collectives[rank] = self.gathered[stage][-1]

    def _after_gather(self, action: Action, rank: int, start: float) -> float:
        """When the first forward of a chunk is done."""
        if action.stage not in self.gathered:
            self._gather(action.stage, rank, start)
        return self.costs.gathered(start, self.costs.of(action), self.gathered[action.stage])

    def _after_reduction(self, action: Action, rank: int, start: float, end: float) -> float:
        """When a backward is done that may be the last of its stage."""
        self.backwards[action.stage] += 1
        if self.backwards[action.stage] == self.shape.num_microbatches:
            both = self.costs.reduction + self.costs.gather
            self.collectives[rank] = self.costs.reduced(start, end, self.collectives[rank], both, self.costs.buckets)
            end = max(end, self.collectives[rank])
        return end

    def _collective(self, action: Action, rank: int, now: float) -> None:
        if action.op is Op.UNSHARD:
            self._gather(action.stage, rank, now)
            return
        buckets = self._buckets(action.stage)
        start = self.spans[rank][-1].start if buckets > 1 else now
        end = self.costs.reduced(start, now, self.collectives[rank], self.costs.reduction, buckets)
        self.collectives[rank] = self.reduced[rank] = end

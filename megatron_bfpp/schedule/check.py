"""Prove a plan: complete, in order, its messages matched, and free of deadlock.

The transport that the proof assumes is NCCL's, the strictest in use, on the communicators that the runtime makes
(`lower.communicator`):
  - A communicator of a rank is one in-order stream: a send or receive starts only once the one before it is complete.
  - A send and its receive complete together, when both have started. Nothing but their order tells messages of one
    pair of ranks apart.
  - Sends and receives are launched without waiting, in the order of the plan.
  - A compute action waits for its message, and for the sends that its rank launched SEND_WINDOW or more compute actions
    earlier. The runtime waits in these places (runtime/executor.py, runtime/p2p.py) and in one more, which cannot
    block: before its backward, for the send of the same output. The gradient that the backward has waited for was
    computed from that output, so the send is complete.
On GPUs the plan of a rank is the order of its compute stream: torch starts a send or receive only after everything that
this stream held when it was launched.
With variable shapes a message is its shape and then its tensor. The runtime then waits for messages alone, each after
those before it on its channel, and never for a send before the end: less than what is proved here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from .ir import CHUNK_OPS, COMPUTE, MESSAGE, RECEIVES, SENDS, Action, Op, PipelineShape, Schedule
from .lower import Communicator, channel, communicator, peer
from .sharding import check_sharding, is_sharded
from .simulate import ScheduleError

# A sent tensor may be reused this many compute actions after its send was launched. By then the receiver has
# posted its receive (`lower.add_send_recv`), and the wait costs nothing. With 1, the send would stand in the way of the
# very next forward, as it does in Megatron since 0.18 (PR 4047).
SEND_WINDOW = 2

# What must stand before an action in the list of its rank: the same stage and microbatch, these ops.
_CAUSES = {Op.F: [Op.RECV_F], Op.B: [Op.RECV_B, Op.F], Op.SEND_F: [Op.F], Op.SEND_B: [Op.B]}

# The position of each action of a rank: steps[stage, op][microbatch], or _ABSENT.
Steps = dict[tuple[int, Op], dict[int | None, int]]
_ABSENT = -1


def check(plan: Schedule, shape: PipelineShape, forward_only: bool = False, resident_chunks: int | None = None) -> None:
    """Raise ScheduleError, naming ranks and actions, unless `plan` is sound for all ranks.

    plan: the lowered actions of every rank. forward_only: no backward is expected (evaluation).
    resident_chunks: parameters are fully sharded, and this many chunks of a rank may be gathered at a time. None: they
        are not, unless the plan has a RESHARD; then any number may be.
    """
    if resident_chunks is None and is_sharded(plan):
        resident_chunks = shape.num_chunks
    if len(plan) != shape.pp_size:
        raise ScheduleError(f"the plan has {len(plan)} ranks, the shape {shape.pp_size}")
    for pp_rank, actions in enumerate(plan):
        steps = _check_complete(actions, pp_rank, shape, forward_only, resident_chunks is not None)
        _check_order(steps, pp_rank, shape)
    _check_chunk_ops(plan, shape)
    if resident_chunks is not None:
        check_sharding(plan, resident_chunks)
    _Run(plan, shape).to_the_end()


def _check_complete(
    actions: list[Action], pp_rank: int, shape: PipelineShape, forward_only: bool, sharded: bool
) -> Steps:
    """Raise ScheduleError unless a rank has each action that it owes once, and no other. Return all positions.

    Gathers of sharded parameters may repeat: `check_sharding` proves those.
    """
    microbatches = range(shape.num_microbatches)
    repeated = {Op.UNSHARD, Op.RESHARD} if sharded else set()
    chunk_ops = CHUNK_OPS - {Op.RESHARD} - ({Op.REDUCE_GRAD} if forward_only else set()) - repeated
    owed: Steps = {key: dict.fromkeys(microbatches, _ABSENT) for key in _owed(pp_rank, shape, forward_only)}
    allowed: Steps = {(stage, op): {None: _ABSENT} for stage in shape.stages_on(pp_rank) for op in chunk_ops}
    steps = owed | allowed
    for step, action in enumerate(actions):
        stage, op, microbatch = action
        if op in repeated and stage in shape.stages_on(pp_rank):
            continue
        row = steps.get((stage, op), {})
        earlier = row.get(microbatch)
        if earlier is None:
            raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} does not belong to this rank")
        if earlier != _ABSENT:
            raise ScheduleError(f"pp_rank {pp_rank}: {action} stands at step {earlier} and again at step {step}")
        row[microbatch] = step
    missing = sorted(Action(*key, mb) for key, row in owed.items() for mb, step in row.items() if step == _ABSENT)
    if missing:
        listed = ", ".join(map(str, missing[:4])) + (" ..." if len(missing) > 4 else "")
        raise ScheduleError(f"pp_rank {pp_rank}: {len(missing)} of its actions are missing: {listed}")
    return steps


def _owed(pp_rank: int, shape: PipelineShape, forward_only: bool) -> Iterator[tuple[int, Op]]:
    """Yield the stages and ops of which a rank owes one action per microbatch."""
    ops = (Op.F, Op.RECV_F, Op.SEND_F) if forward_only else (Op.F, Op.B, *RECEIVES, *SENDS)
    for stage in shape.stages_on(pp_rank):
        yield from ((stage, op) for op in ops if op in COMPUTE or peer(Action(stage, op), shape) is not None)


def _check_order(steps: Steps, pp_rank: int, shape: PipelineShape) -> None:
    """Raise ScheduleError unless, within a rank, causes precede effects and the microbatches of a stage are in order.

    The order of the microbatches is the order of the data iterator (F) and of gradient accumulation (B): another one
    would train on other batches, or to other bits than Megatron's schedule.
    """
    found = min(_disorder(steps, shape), default=None)
    if found is not None:
        step, action, complaint = found
        raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} comes {complaint}")


def _disorder(steps: Steps, shape: PipelineShape) -> Iterator[tuple[int, Action, str]]:
    """Yield each action out of order with its step, and what it should have come after or before."""
    for (stage, op), row in steps.items():
        for cause in _CAUSES.get(op, ()):
            causes = steps.get((stage, cause), {})  # empty at the ends of the model, where nothing is received
            for (mb, step), before in zip(row.items(), causes.values()):
                if step < before:
                    yield step, Action(stage, op, mb), f"before {Action(stage, cause, mb)}"
        if op in COMPUTE:
            for (earlier, before), (mb, step) in pairwise(row.items()):
                if step < before:
                    yield step, Action(stage, op, mb), f"before {Action(stage, op, earlier)}"
    last = shape.num_microbatches - 1
    for (stage, op), row in steps.items():
        if op is Op.REDUCE_GRAD and _ABSENT < row[None] < steps[stage, Op.B][last]:
            yield row[None], Action(stage, op), f"before {Action(stage, Op.B, last)}"
        if op is Op.UNSHARD and row[None] > steps[stage, Op.F][0]:
            yield row[None], Action(stage, op), f"after {Action(stage, Op.F, 0)}"


def _check_chunk_ops(plan: Schedule, shape: PipelineShape) -> None:
    """Raise ScheduleError unless reductions, and gathers, are in the plan for all stages or none (no data parallelism).

    A chunk left out would train on the gradients of its own replica alone.
    """
    present = {action for actions in plan for action in actions if action.microbatch is None}
    for op in sorted({action.op for action in present}):
        for stage in range(shape.num_stages):
            missing = Action(stage, op)
            if missing not in present:
                raise ScheduleError(f"pp_rank {shape.rank_of(stage)}: {missing} is missing; other stages have theirs")


@dataclass(eq=False, slots=True)
class _Stream:
    """The sends and receives that one rank has launched on one communicator and that are not complete, in order."""

    pp_rank: int
    actions: deque[Action] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _End:
    """The properties that the sends, or the receives, of one kind and one stage share."""

    stream: _Stream  # they are launched on it
    far: _Stream  # their other ends are launched on it
    peer_stage: int
    peer_op: Op


class _Run:
    """A dry run of all ranks, each as far as it gets, until all are done or none can move.

    The order in which ranks take turns does not matter: each puts its actions on streams of its own, and no action of
    one rank takes away what another can do.
    """

    def __init__(self, plan: Schedule, shape: PipelineShape):
        self.plan, self.shape = plan, shape
        self.position = [0] * shape.pp_size
        self.blocker: list[Action | None] = [None] * shape.pp_size  # the send or receive that the rank waits for
        self.ready = list(range(shape.pp_size))
        self.complete: set[Action] = set()  # sends and receives
        # Per rank, the sends after each of its last compute actions; with SEND_WINDOW of them, the oldest are due.
        self.sent: list[deque[list[Action]]] = [deque([[]], SEND_WINDOW) for _ in plan]
        self.streams: dict[tuple[int, Communicator], _Stream] = {}
        self.ends = dict(self._ends())

    def _ends(self) -> Iterator[tuple[tuple[int, Op], _End]]:
        for stage in range(self.shape.num_stages):
            for op in (*SENDS, *RECEIVES):
                near = Action(stage, op)
                far = peer(near, self.shape)
                if far is not None:
                    name = communicator(channel(near if op in SENDS else far, self.shape), self.shape.pp_size)
                    stream, other = (self._stream(self.shape.rank_of(end.stage), name) for end in (near, far))
                    yield (stage, op), _End(stream, other, far.stage, far.op)

    def _stream(self, pp_rank: int, name: Communicator) -> _Stream:
        return self.streams.setdefault((pp_rank, name), _Stream(pp_rank))

    def to_the_end(self) -> None:
        """Raise ScheduleError with every blocked rank unless all compute actions run.

        Then the messages are complete too: each receive is waited for by an action, and a send ends with its receive.
        """
        while self.ready:
            self._advance(self.ready.pop())
        blocked = list(self._blocked())
        if blocked:
            raise ScheduleError("\n".join(["no rank can run its next action:", *blocked]))

    def _advance(self, pp_rank: int) -> None:
        """Run a rank until it must wait."""
        actions, sent = self.plan[pp_rank], self.sent[pp_rank]
        for position in range(self.position[pp_rank], len(actions)):
            action = actions[position]
            op = action.op
            if op in COMPUTE:
                blocker = self._blocker_of(action, sent)
                if blocker is not None:
                    self.position[pp_rank], self.blocker[pp_rank] = position, blocker
                    return
                sent.append([])
            elif op not in CHUNK_OPS:
                if op in SENDS:
                    sent[-1].append(action)
                end = self.ends[action.stage, op]
                end.stream.actions.append(action)
                if len(end.stream.actions) == 1 and end.far.actions:
                    self._meet(end.stream)

    def _blocker_of(self, action: Action, sent: deque[list[Action]]) -> Action | None:
        """Return what `action` waits for: its own message, or a send whose tensor is due for reuse."""
        stage, op, microbatch = action
        message = stage, MESSAGE[op], microbatch  # a plain tuple equals the Action, and costs a quarter of it
        if message not in self.complete and message[:2] in self.ends:
            return Action(*message)
        if len(sent) == SEND_WINDOW:
            for send in sent[0]:
                if send not in self.complete:
                    return send
        return None

    def _meet(self, stream: _Stream) -> None:
        """Complete the first action of `stream` if its other end comes first too; then those behind the two."""
        changed = [stream]
        while changed:
            near = changed.pop()
            if not near.actions:
                continue
            action = near.actions[0]
            end = self.ends[action.stage, action.op]
            far = end.far
            if not far.actions:
                continue
            if far.actions[0] == (end.peer_stage, end.peer_op, action.microbatch):
                self._complete_first(near)
                self._complete_first(far)
                changed += near, far
            else:
                self._check_not_crossed(near, far)

    def _complete_first(self, stream: _Stream) -> None:
        action = stream.actions.popleft()
        self.complete.add(action)
        if self.blocker[stream.pp_rank] == action:
            self.blocker[stream.pp_rank] = None
            self.ready.append(stream.pp_rank)

    def _check_not_crossed(self, near: _Stream, far: _Stream) -> None:
        """Raise ScheduleError if the heads of two streams are a send and a receive between the two ranks, not its pair.

        NCCL would pair them: nothing else tells messages apart.
        """
        for source, target in ((near, far), (far, near)):
            send, receive = source.actions[0], target.actions[0]
            meet = self.ends[send.stage, send.op].far is target and self.ends[receive.stage, receive.op].far is source
            if meet and send.op in SENDS and receive.op in RECEIVES:
                sent_at, received_at = (self.plan[end.pp_rank].index(end.actions[0]) for end in (source, target))
                raise ScheduleError(
                    f"messages from pp_rank {source.pp_rank} to pp_rank {target.pp_rank} are crossed: "
                    f"pp_rank {source.pp_rank} step {sent_at} {send} meets "
                    f"pp_rank {target.pp_rank} step {received_at} {receive}"
                )

    def _blocked(self) -> Iterator[str]:
        for pp_rank, blocker in enumerate(self.blocker):
            if blocker is None:
                continue
            position, end = self.position[pp_rank], self.ends[blocker.stage, blocker.op]
            if blocker.op in RECEIVES:
                what = f"{end.peer_op} of pp_rank {end.far.pp_rank}"
            else:
                what = f"the receive of its {blocker.op} by pp_rank {end.far.pp_rank}"
            # A stream of one direction of one kind of message holds nothing else that could stand in the way.
            ways = (end.stream, blocker.op), (end.far, end.peer_op)
            others = [way.actions[0] for way, op in ways if way.actions and way.actions[0].op is not op]
            behind = f", behind {others[0]} on one communicator" if others else ""
            yield f"  pp_rank {pp_rank}: step {position} {self.plan[pp_rank][position]} waits for {what}{behind}"

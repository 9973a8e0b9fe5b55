"""Run a plan dry under the rules of NCCL and CUDA: what hangs there, hangs here and is named.

The transport is NCCL's, the strictest in use, on the communicators that the runtime makes (`ir.communicator`):
  - A communicator of a rank is one in-order stream: a send or receive starts only once the one before it is complete.
  - A send and its receive complete together, when both have started. Nothing but their order tells messages of one
    pair of ranks apart.
  - Sends and receives are launched without waiting, in the order of the plan.
  - A compute action waits for its message, and for the sends that its rank launched SEND_WINDOW or more compute actions
    earlier; a W waits for nothing and does not count there. The runtime waits in these places (runtime/executor.py,
    runtime/p2p.py) and in one more, which cannot block: before its backward, for the send of the same output. The
    gradient that the backward has waited for was computed from that output, so the send is complete.
On GPUs the plan of a rank is the order of its compute stream: torch starts a send or receive only after everything
that this stream held when it was launched. Two more rules of CUDA are proved beside NCCL's:
  - One hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1): what is launched on any stream of a rank starts in the order of
    launch. A send or receive that cannot start, behind another one of its communicator, holds back all later
    computation. More queues hold back less: what runs with one runs with any number.
  - A wait for the whole device (cudaFree, the first load of a kernel, an allocator that tries again) on one rank,
    before any of its actions: all that the rank has launched must end although the rank launches nothing more. So what
    a rank has posted may not depend on what it does later.
Headers travel beside the channels, from host to host. With variable shapes the host waits for a header where it posts
the receive: its plan posts nothing ahead (`lower.add_send_recv` without a hop), so all waits point back in time.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .ir import (
    CHUNK_OPS,
    COMPUTE,
    MESSAGE,
    PASSES,
    RECEIVES,
    SEND_WINDOW,
    SENDS,
    Action,
    Communicator,
    Op,
    PipelineShape,
    Schedule,
    channel,
    communicator,
    peer,
)
from .simulate import Key, ScheduleError


def dry_run(plan: Schedule, shape: PipelineShape, one_queue: bool = True, device_waits: bool = True) -> None:
    """Raise ScheduleError, naming ranks and actions, if a rank cannot go on; with device_waits, if it could not.

    plan: complete and in order, which `check` sees to. one_queue, device_waits: the two rules of CUDA.
    """
    run = _Run(plan, shape, one_queue, device_waits)
    run.to_the_end()
    for action, cause in run.early.items():
        raise ScheduleError(run.too_early(action, cause))


def posted_too_early(plan: Schedule, shape: PipelineShape) -> dict[Action, int]:
    """Return the receives and sends whose other ends depend on later actions of their rank, with the last one's step.

    Empty for a plan that hangs: `dry_run` says where.
    """
    run = _Run(plan, shape, one_queue=True, device_waits=True)
    try:
        run.to_the_end()
    except ScheduleError:
        return {}
    return run.early


class _Step(NamedTuple):
    """A place in the plan."""

    pp_rank: int
    position: int


@dataclass(eq=False, slots=True)
class _Stream:
    """The sends and receives that one rank has launched on one communicator and that are not complete, in order."""

    pp_rank: int
    actions: deque[Action] = field(default_factory=deque)
    launched: deque[_Step] = field(default_factory=deque)
    over: _Step | None = None  # the launch of the far end of the last that is complete


@dataclass(frozen=True, slots=True)
class _End:
    """The properties that the sends, or the receives, of one kind and one stage share."""

    stream: _Stream  # they are launched on it
    far: _Stream  # their other ends are launched on it
    peer_stage: int
    peer_op: Op


class _Run:
    """A dry run of all ranks, one compute action of each in turn, until all are done or none can move.

    The order in which ranks take turns does not matter: each puts its actions on streams of its own, and no action of
    one rank takes away what another can do.
    """

    def __init__(self, plan: Schedule, shape: PipelineShape, one_queue: bool, device_waits: bool):
        self.plan, self.shape, self.one_queue, self.device_waits = plan, shape, one_queue, device_waits
        self.blocker: list[Action | None] = [None] * shape.pp_size  # the send or receive that the rank waits for
        self.ready = deque(range(shape.pp_size))
        self.complete: dict[Key, _Step] = {}  # send or receive -> the launch of its other end
        # Per rank, the sends after each of its last compute actions; with SEND_WINDOW of them, the oldest are due.
        self.sent: list[deque[list[Action]]] = [deque([[]], SEND_WINDOW) for _ in plan]
        self.streams: dict[tuple[int, Communicator], _Stream] = {}
        self.ends = dict(self._ends())
        self.turn = 0
        self.turns: list[list[int]] = [[] for _ in plan]  # when each action of a rank ran
        self.needs: dict[_Step, list[_Step]] = {}  # what an action waited for, on other ranks
        self.early: dict[Action, int] = {}  # send or receive -> the step of its rank that its other end depends on

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
            pp_rank = self.ready.popleft()
            if self._advance(pp_rank):
                self.ready.append(pp_rank)
        blocked = list(self._blocked())
        if blocked:
            where = " on one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1)" if self.one_queue else ""
            raise ScheduleError("\n".join([f"no rank can run its next action{where}:", *blocked]))

    def _advance(self, pp_rank: int) -> bool:
        """Run a rank up to and with its next compute action; return whether it can go on."""
        actions, sent, turns = self.plan[pp_rank], self.sent[pp_rank], self.turns[pp_rank]
        for position in range(len(turns), len(actions)):
            action = actions[position]
            step = _Step(pp_rank, position)
            blocker = None
            if action.op in PASSES:
                blocker = self._compute(action, step, sent)
            elif action.op not in CHUNK_OPS and action.op is not Op.W:
                blocker = self._launch(action, step, sent)
            if blocker is not None:
                self.blocker[pp_rank] = blocker
                return False
            turns.append(self.turn)
            self.turn += 1
            if action.op in COMPUTE:
                return True
        return False

    def _compute(self, action: Action, step: _Step, sent: deque[list[Action]]) -> Action | None:
        """Run a forward or backward, or return what it waits for: its message, or a send whose tensor is due."""
        stage, op, microbatch = action
        message = stage, MESSAGE[op], microbatch  # a plain tuple equals the Action, and costs a quarter of it
        waits: list[Key] = [message] if message[:2] in self.ends else []
        if len(sent) == SEND_WINDOW:
            waits += sent[0]
        for each in waits:
            if each not in self.complete:
                return Action(*each)
        if waits:
            self.needs[step] = [self.complete[each] for each in waits]
        sent.append([])
        return None

    def _launch(self, action: Action, step: _Step, sent: deque[list[Action]]) -> Action | None:
        """Launch a send or receive; on one queue return what stands in its way instead."""
        end = self.ends[action.stage, action.op]
        stream = end.stream
        if self.one_queue:
            if stream.actions:
                return stream.actions[0]
            if stream.over is not None:
                self.needs[step] = [stream.over]
        if action.op in SENDS:
            sent[-1].append(action)
        stream.actions.append(action)
        stream.launched.append(step)
        if len(stream.actions) == 1 and end.far.actions:
            self._meet(stream)
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
                both = near.launched.popleft(), far.launched.popleft()
                self._complete(near, *both)
                self._complete(far, *both[::-1])
                changed += near, far
            else:
                self._check_not_crossed(near, far)

    def _complete(self, stream: _Stream, launched: _Step, far: _Step) -> None:
        """Complete the first action of a stream. launched, far: where it and its other end were launched."""
        action = stream.actions.popleft()
        stream.over = self.complete[action] = far
        if self.device_waits:
            cause = self._last_cause(far, launched)
            if cause > launched.position:
                self.early[action] = cause
        if self.blocker[stream.pp_rank] == action:
            self.blocker[stream.pp_rank] = None
            self.ready.append(stream.pp_rank)

    def _last_cause(self, step: _Step, after: _Step) -> int:
        """Return the last action of the rank of `after`, behind it, on which `step` depends; -1 if on none.

        It goes back from `step`. What ran before the first of those actions does not depend on it: the search is short.
        """
        turns = self.turns[after.pp_rank]
        if len(turns) <= after.position + 1:  # it has not come further yet
            return -1
        since, last = turns[after.position + 1], -1
        coming, seen = [step], {step}
        while coming:
            pp_rank, position = each = coming.pop()
            if pp_rank == after.pp_rank:
                last = max(last, position)
                continue
            before = _Step(pp_rank, position - 1)
            for cause in (before, *self.needs.get(each, ())) if position else self.needs.get(each, ()):
                if cause not in seen and self.turns[cause.pp_rank][cause.position] >= since:
                    seen.add(cause)
                    coming.append(cause)
        return last

    def too_early(self, action: Action, cause: int) -> str:
        """Return what is wrong with the place of a send or receive. cause: the step that its other end depends on."""
        pp_rank, end = self.shape.rank_of(action.stage), self.ends[action.stage, action.op]
        actions = self.plan[pp_rank]
        return (
            f"pp_rank {pp_rank}: step {actions.index(action)} {action} is launched too early: the {end.peer_op} of "
            f"pp_rank {end.far.pp_rank} that it meets waits for step {cause} {actions[cause]} of pp_rank {pp_rank}. "
            f"Should this rank wait for its whole device in between (cudaFree, the first load of a kernel), it waits "
            f"for ever"
        )

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
            position, end = len(self.turns[pp_rank]), self.ends[blocker.stage, blocker.op]
            if blocker.op in RECEIVES:
                what = f"{end.peer_op} of pp_rank {end.far.pp_rank}"
            else:
                what = f"the receive of its {blocker.op} by pp_rank {end.far.pp_rank}"
            # A stream of one direction of one kind of message holds nothing else that could stand in the way.
            ways = (end.stream, blocker.op), (end.far, end.peer_op)
            others = [way.actions[0] for way, op in ways if way.actions and way.actions[0].op is not op]
            behind = f", behind {others[0]} on one communicator" if others else ""
            yield f"  pp_rank {pp_rank}: step {position} {self.plan[pp_rank][position]} waits for {what}{behind}"

"""Prove a plan: complete, in order, its messages matched, and free of deadlock. Standard library only.

The transport that the proof assumes is NCCL's, the strictest in use: every channel (`lower.channel`) is one
communicator whose operations run in the order in which they were launched, matched by that order alone; a send
completes only once its receive is posted; sends and receives are launched without waiting; a compute action waits for
its message, and before it runs, for the sends that its rank launched SEND_WINDOW or more compute actions earlier.
The runtime waits in exactly these places (runtime/executor.py, runtime/p2p.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .ir import CHUNK_OPS, COMPUTE, RECEIVES, SENDS, Action, Op, PipelineShape, Schedule
from .lower import Channel, channel, peer
from .simulate import ScheduleError

# A sent tensor may be reused this many compute actions after its send was launched. By then the receiver has
# posted its receive (`lower.add_send_recv`), and the wait costs nothing. With 1, the send would stand in the way of the
# very next forward, as it does in Megatron since 0.18 (PR 4047).
SEND_WINDOW = 2

_RESULT = {Op.SEND_F: Op.F, Op.SEND_B: Op.B}
_MESSAGE = {Op.F: Op.RECV_F, Op.B: Op.RECV_B}


def check(plan: Schedule, shape: PipelineShape, forward_only: bool = False) -> None:
    """Raise ScheduleError, naming ranks and actions, unless `plan` is sound for all ranks.

    plan: the lowered actions of every rank. forward_only: no backward is expected (evaluation).
    """
    if len(plan) != shape.pp_size:
        raise ScheduleError(f"the plan has {len(plan)} ranks, the shape {shape.pp_size}")
    for pp_rank, actions in enumerate(plan):
        _check_complete(actions, pp_rank, shape, forward_only)
        _check_order(actions, pp_rank, shape)
    _check_chunk_ops(plan, shape)
    sends, receives = _messages(plan, SENDS, shape), _messages(plan, RECEIVES, shape)
    for key in sorted(sends.keys() | receives.keys(), key=str):
        _check_matched(key, sends[key], receives[key])
    _Run(plan, shape).to_the_end()


def _check_complete(actions: list[Action], pp_rank: int, shape: PipelineShape, forward_only: bool) -> None:
    """Every action that the rank owes stands exactly once in its list, and no other."""
    seen: dict[Action, int] = {}
    for step, action in enumerate(actions):
        if action in seen:
            raise ScheduleError(f"pp_rank {pp_rank}: {action} stands at step {seen[action]} and again at step {step}")
        seen[action] = step
    owed = set(_owed(pp_rank, shape, forward_only))
    for action, step in seen.items():
        if action not in owed and not (action.op in CHUNK_OPS and action.stage in shape.stages_on(pp_rank)):
            raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} does not belong to this rank")
    missing = [action for action in owed if action not in seen]
    if missing:
        listed = ", ".join(map(str, sorted(missing)[:4])) + (" ..." if len(missing) > 4 else "")
        raise ScheduleError(f"pp_rank {pp_rank}: {len(missing)} of its actions are missing: {listed}")


def _owed(pp_rank: int, shape: PipelineShape, forward_only: bool) -> Iterator[Action]:
    ops = (Op.F, Op.SEND_F, Op.RECV_F) if forward_only else (Op.F, Op.B, *_RESULT, *_MESSAGE.values())
    for stage in shape.stages_on(pp_rank):
        for op in ops:
            if op in COMPUTE or peer(Action(stage, op), shape) is not None:
                yield from (Action(stage, op, microbatch) for microbatch in range(shape.num_microbatches))


def _check_chunk_ops(plan: Schedule, shape: PipelineShape) -> None:
    """Gradient reductions and parameter gathers stand in the plan for all stages or for none (no data parallelism).

    A chunk left out would train on the gradients of its own replica alone.
    """
    for op in sorted(CHUNK_OPS):
        stages = {action.stage for actions in plan for action in actions if action.op is op}
        for stage in range(shape.num_stages):
            if stages and stage not in stages:
                missing = Action(stage, op)
                raise ScheduleError(f"pp_rank {shape.rank_of(stage)}: {missing} is missing; other stages have theirs")


def _check_order(actions: list[Action], pp_rank: int, shape: PipelineShape) -> None:
    """Within a rank: cause before effect, and the microbatches of a stage in order.

    The order of the microbatches is the order of the data iterator (F) and of gradient accumulation (B): another one
    would train on other batches, or to other bits than Megatron's schedule.
    """
    done: set[Action] = set()
    following: dict[tuple[int, Op], int] = defaultdict(int)
    for step, action in enumerate(actions):
        for cause in _causes(action, shape):
            if cause not in done:
                raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} comes before {cause}")
        if action.op in COMPUTE:
            key = action.stage, action.op
            if action.microbatch != following[key]:
                expected = Action(action.stage, action.op, following[key])
                raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} comes before {expected}")
            following[key] += 1
        done.add(action)
        if action.op is Op.UNSHARD and Action(action.stage, Op.F, 0) in done:
            raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} comes after {action.stage}F0")


def _causes(action: Action, shape: PipelineShape) -> Iterator[Action]:
    """The actions of the same rank that must stand before `action`."""
    stage, op, microbatch = action
    if op in SENDS:
        yield Action(stage, _RESULT[op], microbatch)
    elif op is Op.REDUCE_GRAD:
        yield Action(stage, Op.B, shape.num_microbatches - 1)
    elif op in COMPUTE:
        if peer(Action(stage, _MESSAGE[op], microbatch), shape) is not None:
            yield Action(stage, _MESSAGE[op], microbatch)
        if op is Op.B:
            yield Action(stage, Op.F, microbatch)


def _messages(plan: Schedule, ops: frozenset[Op], shape: PipelineShape) -> dict[Channel, list[tuple[Action, int]]]:
    """Per channel, the sends (or receives) of its one rank in launch order, each with its step."""
    found: dict[Channel, list[tuple[Action, int]]] = defaultdict(list)
    for actions in plan:
        for step, action in enumerate(actions):
            if action.op in ops:
                send = action if ops is SENDS else peer(action, shape)
                assert send is not None, "_check_complete admits no message without a peer"
                found[channel(send, shape)].append((action, step))
    return found


def _check_matched(key: Channel, sends: list[tuple[Action, int]], receives: list[tuple[Action, int]]) -> None:
    """The n-th send of a channel must be what its n-th receive expects: nothing else tells messages apart."""
    _, source, target = key
    for (send, sent_at), (receive, received_at) in zip(sends, receives, strict=True):
        step = 1 if send.op is Op.SEND_F else -1
        if (send.stage + step, send.microbatch) != (receive.stage, receive.microbatch):
            raise ScheduleError(
                f"messages from pp_rank {source} to pp_rank {target} are crossed: pp_rank {source} step {sent_at} "
                f"{send} meets pp_rank {target} step {received_at} {receive}"
            )


class _Run:
    """A dry run of all ranks, each as far as it comes, until all are done or none can move."""

    def __init__(self, plan: Schedule, shape: PipelineShape):
        self.plan, self.shape = plan, shape
        self.position = [0] * shape.pp_size
        self.launched: dict[Channel, int] = defaultdict(int)  # sends
        self.posted: dict[Channel, int] = defaultdict(int)  # receives
        self.expected: dict[Action, tuple[Channel, int]] = {}  # compute action -> its message's number
        # Per rank, the sends of the last SEND_WINDOW compute actions and before: (channel, number).
        self.unfinished: list[list[list[tuple[Channel, int]]]] = [[[]] for _ in plan]
        self.waiting: dict[Channel, set[int]] = defaultdict(set)

    def to_the_end(self) -> None:
        ready = set(range(self.shape.pp_size))
        while ready:
            ready |= self._advance(ready.pop())
        if any(position < len(actions) for position, actions in zip(self.position, self.plan)):
            raise ScheduleError("\n".join(["no rank can run its next action:", *self._blocked()]))

    def _advance(self, rank: int) -> set[int]:
        """Run `rank` until it must wait; the ranks that may go on because of it."""
        woken: set[int] = set()
        actions = self.plan[rank]
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            if action.op in COMPUTE:
                blocker = self._blocker(action, rank)
                if blocker is not None:
                    self.waiting[blocker].add(rank)
                    break
                self._retire(rank)
            elif action.op not in CHUNK_OPS:
                woken |= self.waiting.pop(self._launch(action, rank), set())
            self.position[rank] += 1
        return woken

    def _launch(self, action: Action, rank: int) -> Channel:
        if action.op in SENDS:
            key = channel(action, self.shape)
            self.unfinished[rank][-1].append((key, self.launched[key]))
            self.launched[key] += 1
        else:
            send = peer(action, self.shape)
            assert send is not None, "_check_complete admits no message without a peer"
            key = channel(send, self.shape)
            compute = Op.F if action.op is Op.RECV_F else Op.B
            self.expected[Action(action.stage, compute, action.microbatch)] = key, self.posted[key]
            self.posted[key] += 1
        return key

    def _blocker(self, action: Action, rank: int) -> Channel | None:
        """The channel that `action` waits for: its own message, or a send whose tensor is due for reuse."""
        message = self.expected.get(action)
        if message is not None and self.launched[message[0]] <= message[1]:
            return message[0]
        for sends in self.unfinished[rank][: 1 - SEND_WINDOW]:
            for key, number in sends:
                if self.posted[key] <= number:
                    return key
        return None

    def _retire(self, rank: int) -> None:
        unfinished = self.unfinished[rank]
        unfinished.append([])
        del unfinished[:-SEND_WINDOW]

    def _blocked(self) -> Iterator[str]:
        for rank, (actions, position) in enumerate(zip(self.plan, self.position)):
            if position == len(actions):
                continue
            key = self._blocker(actions[position], rank)
            assert key is not None, "a rank that stopped early is blocked"
            op, source, target = key
            verb = f"{op} of pp_rank {source}" if target == rank else f"the receive of its {op} by pp_rank {target}"
            yield f"  pp_rank {rank}: step {position} {actions[position]} waits for {verb}"

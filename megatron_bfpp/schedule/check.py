"""Prove a plan: complete, in order, its messages matched, and free of deadlock on the transport of dry_run.py."""

from collections.abc import Iterator
from itertools import pairwise

from .dry_run import dry_run
from .ir import CHUNK_OPS, COMPUTE, RECEIVES, SENDS, Action, Op, PipelineShape, Schedule, peer
from .sharding import check_sharding, is_sharded
from .simulate import ScheduleError

# What must stand before an action in the list of its rank: the same stage and microbatch, these ops.
_CAUSES = {
    Op.F: [Op.RECV_F],
    Op.B: [Op.RECV_B, Op.F],
    Op.I: [Op.RECV_B, Op.F],
    Op.W: [Op.I],
    Op.SEND_F: [Op.F],
    Op.SEND_B: [Op.B, Op.I],
}

# The position of each action of a rank: steps[stage, op][microbatch], or _ABSENT.
Steps = dict[tuple[int, Op], dict[int | None, int]]
_ABSENT = -1


def check(
    plan: Schedule, shape: PipelineShape, forward_only: bool = False, resident_chunks: int | None = None, *,
    one_queue: bool = True, device_waits: bool = True,
) -> None:  # fmt: skip
    """Raise ScheduleError, naming ranks and actions, unless `plan` is sound for all ranks.

    plan: the lowered actions of every rank. forward_only: no backward is expected (evaluation).
    resident_chunks: parameters are fully sharded, and this many chunks of a rank may be gathered at a time. None: they
        are not, unless the plan has a RESHARD; then any number may be.
    one_queue, device_waits: prove it for one hardware queue, and for a wait for the whole device at any action. Without
        them the plan is proved for a transport that has a queue for each communicator, and nothing else that waits.
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
    try:
        dry_run(plan, shape, one_queue, device_waits)
    except ScheduleError:
        # One queue is the stricter rule: a plan that hangs without it too is reported so.
        dry_run(plan, shape, one_queue=False, device_waits=False)
        raise


def _check_complete(
    actions: list[Action], pp_rank: int, shape: PipelineShape, forward_only: bool, sharded: bool
) -> Steps:
    """Raise ScheduleError unless a rank has each action that it owes once, and no other. Return all positions.

    Gathers of sharded parameters may repeat: `check_sharding` proves those.
    """
    microbatches = range(shape.num_microbatches)
    repeated = {Op.UNSHARD, Op.RESHARD} if sharded else set()
    chunk_ops = CHUNK_OPS - {Op.RESHARD} - ({Op.REDUCE_GRAD} if forward_only else set()) - repeated
    split = {action.stage for action in actions if action.op in (Op.I, Op.W)}
    owed: Steps = {key: dict.fromkeys(microbatches, _ABSENT) for key in _owed(pp_rank, shape, forward_only, split)}
    allowed: Steps = {(stage, op): {None: _ABSENT} for stage in shape.stages_on(pp_rank) for op in chunk_ops}
    steps = owed | allowed
    for step, action in enumerate(actions):
        stage, op, microbatch = action
        if op in repeated and stage in shape.stages_on(pp_rank):
            continue
        row = steps.get((stage, op), {})
        earlier = row.get(microbatch)
        if earlier is None:
            is_whole = op is Op.B and stage in split and stage in shape.stages_on(pp_rank)
            complaint = (
                "is whole, but other backwards of its stage are split" if is_whole else "does not belong to this rank"
            )
            raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} {complaint}")
        if earlier != _ABSENT:
            raise ScheduleError(f"pp_rank {pp_rank}: {action} stands at step {earlier} and again at step {step}")
        row[microbatch] = step
    missing = sorted(Action(*key, mb) for key, row in owed.items() for mb, step in row.items() if step == _ABSENT)
    if missing:
        listed = ", ".join(map(str, missing[:4])) + (" ..." if len(missing) > 4 else "")
        raise ScheduleError(f"pp_rank {pp_rank}: {len(missing)} of its actions are missing: {listed}")
    return steps


def _owed(pp_rank: int, shape: PipelineShape, forward_only: bool, split: set[int]) -> Iterator[tuple[int, Op]]:
    """Yield the stages and ops of which a rank owes one action per microbatch. split: stages with an I and a W."""
    for stage in shape.stages_on(pp_rank):
        backward = (Op.I, Op.W) if stage in split else (Op.B,)
        ops = (Op.F, Op.RECV_F, Op.SEND_F) if forward_only else (Op.F, *backward, *RECEIVES, *SENDS)
        yield from ((stage, op) for op in ops if op in COMPUTE or peer(Action(stage, op), shape) is not None)


def _check_order(steps: Steps, pp_rank: int, shape: PipelineShape) -> None:
    """Raise ScheduleError unless, within a rank, causes precede effects and the microbatches of a stage are in order.

    The order of the microbatches is the order of the data iterator (F) and of gradient accumulation (B; I and W):
    another one would train on other batches, or to other bits than Megatron's schedule.
    """
    found = min(_disorder(steps, shape), default=None)
    if found is not None:
        step, action, complaint = found
        raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} comes {complaint}")


def _disorder(steps: Steps, shape: PipelineShape) -> Iterator[tuple[int, Action, str]]:
    """Yield each action out of order with its step, and what it should have come after or before."""
    for (stage, op), row in steps.items():
        for cause in _CAUSES.get(op, ()):
            # Empty at the ends of the model, where nothing is received, and for the backward that a stage has not.
            causes = steps.get((stage, cause), {})
            for (mb, step), before in zip(row.items(), causes.values()):
                if step < before:
                    yield step, Action(stage, op, mb), f"before {Action(stage, cause, mb)}"
        if op in COMPUTE:
            for (earlier, before), (mb, step) in pairwise(row.items()):
                if step < before:
                    yield step, Action(stage, op, mb), f"before {Action(stage, op, earlier)}"
    last = shape.num_microbatches - 1
    for (stage, op), row in steps.items():
        if op is Op.REDUCE_GRAD:
            final = Op.W if (stage, Op.W) in steps else Op.B
            if _ABSENT < row[None] < steps[stage, final][last]:
                yield row[None], Action(stage, op), f"before {Action(stage, final, last)}"
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

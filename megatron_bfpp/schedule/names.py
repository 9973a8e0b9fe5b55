"""The schedules by their names, and how others run one, for predictions: how they wait, where Megatron launches reductions and gathers."""

from __future__ import annotations

from collections.abc import Iterator

from .collectives import OURS, Waits
from .ir import Action, Op, PipelineShape, Schedule
from .orders import breadth_first, interleaved_1f1b, one_f_one_b

# Megatron's schedule without chunks, its default with chunks, the same with a group of all micro-batches, and this plugin's with
# either backward: the words of bfpp show, plan and bench.
ORDERS = ("1f1b", "interleaved", "interleaved-grouped", "breadth-first", "breadth-first-late")

MEGATRON = Waits(for_forward_sends=True)  # since 0.18 (PR 4047), before the output is freed
TORCH = Waits(for_sends=False, for_reductions=True)  # torch.distributed.pipelining's looped schedules, 2.14, with its DDP


def order_of(name: str, shape: PipelineShape, group: int | None = None) -> Schedule:
    """The order that goes by that name. group: of interleaved and breadth-first; None for their defaults. 1f1b takes num_chunks 1."""
    if name == "1f1b":
        return one_f_one_b(shape)
    if name == "interleaved-grouped":
        return interleaved_1f1b(shape, shape.num_microbatches)
    if name == "interleaved":
        return interleaved_1f1b(shape, group)
    return breadth_first(shape, group, eager_backward=name == "breadth-first")


def waits_of(name: str) -> Waits:
    """What waits for what while that order runs; an order of any other name is run by this plugin."""
    return MEGATRON if name in ("1f1b", "interleaved", "interleaved-grouped") else OURS


def aligned(plan: Schedule, shape: PipelineShape) -> Schedule:
    """A lowered plan with reductions and gathers where Megatron's interleaved loop launches them by default.

    --align-grad-reduce and --align-param-gather launch them at the same time on all pipeline ranks: pp_rank r launches a reduction r
    backwards after the last of the chunk, and a gather r forwards before the first of the chunk before; the first two
    chunks are gathered at the start (forward_backward_pipelining_with_interleaving).
    """
    return [list(_aligned(actions, rank, shape)) for rank, actions in enumerate(plan)]


def _aligned(actions: list[Action], rank: int, shape: PipelineShape) -> Iterator[Action]:
    stages, last = shape.stages_on(rank), shape.num_microbatches - 1
    forwards, backwards = ([each for each in actions if each.op is op] for op in (Op.F, Op.B))
    forward = backward = 0
    pending = {each.stage for each in backwards}
    yield from (Action(stage, Op.UNSHARD) for stage in stages[:2])
    for action in actions:
        if action.op is Op.F:
            ahead = forwards[forward + rank] if forward + rank < len(forwards) else None
            forward += 1
            if ahead is not None and ahead.microbatch == 0 and stages[0] < ahead.stage < stages[-1]:
                yield Action(ahead.stage + shape.pp_size, Op.UNSHARD)
        if action.op not in (Op.UNSHARD, Op.REDUCE_GRAD):
            yield action
        if action.op is Op.B:
            behind = backwards[backward - rank] if backward >= rank else None
            backward += 1
            if behind is not None and behind.microbatch == last:
                pending.discard(behind.stage)
                yield Action(behind.stage, Op.REDUCE_GRAD)
    yield from (Action(stage, Op.REDUCE_GRAD) for stage in sorted(pending))

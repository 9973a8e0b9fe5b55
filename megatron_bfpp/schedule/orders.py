"""Orders: which forward and backward every rank runs, and when. Compute only; `lower` adds the communication.

Every order here keeps microbatches 0..M-1 in order within a stage, forward and backward. Gradients are then
accumulated in the order of Megatron's default schedule, which is what makes the losses bit-identical to it.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from ..console.errors import UserError
from .ir import Action, Op, PipelineShape, Schedule


def breadth_first(
    shape: PipelineShape, group: int | None = None, eager_backward: bool = True, weight_lag: Sequence[int] | None = None
) -> Schedule:
    """Run all microbatches of a group through one chunk before the next chunk; backward with the chunks reversed.

    group: microbatches per group, 1 <= group <= M; None for all of them (the paper's schedule). Groups follow each
        other without a flush of the pipeline. If M is no multiple of it, groups are made even.
    eager_backward: on the last chunk a backward starts as soon as its loss gradient can be there. Same step time
        with group None or at least P (smaller groups can take up to 1.6 times as long), fewer live activations.
        False: a whole group of forwards first; with all microbatches in it, the paper's plain order.
    weight_lag: split every backward, see `split_backward`; None for whole ones.

    Live activations on rank r, at most: min(M V, C G + 2 min(P-r-1, g) + 1), where C is V-1 if eager and V if late, and
    G and g are the sizes of the longest and the shortest group. They are the forwards ahead of the first backward and
    the one after them; from there on each forward is followed by a backward.

    Source: Lamy-Poirier 2022, "Breadth-First Pipeline Parallelism", arXiv:2211.05953. Backwards keep the order
    0..M-1, unlike torch.distributed.pipelining's LoopedBFS, which reverses them.
    """
    size = shape.num_microbatches if group is None else group
    if not 1 <= size <= shape.num_microbatches:
        raise UserError(f"group is {size}; it must lie between 1 and the {shape.num_microbatches} microbatches")
    groups = _groups(shape, size)
    longest = max(map(len, groups))

    def warmup(pp_rank: int) -> int:
        # The loss gradient needs P-r-1 hops to the last rank and back. The lead over the last rank is bounded by
        # two groups: with fewer microbatches than ranks in a group, a longer lead would have rank 0 wait for a
        # backward that itself waits for a forward of rank 0.
        lead = 2 * min(shape.pp_size - pp_rank - 1, min(map(len, groups)))
        return (shape.num_chunks - eager_backward) * longest + lead

    order = [_alternate(shape, rank, groups, warmup(rank)) for rank in range(shape.pp_size)]
    return order if weight_lag is None else split_backward(order, weight_lag)


def split_backward(order: Schedule, weight_lag: Sequence[int]) -> Schedule:
    """Return `order` with each B split in two: the input's gradient (I) where it stood, the weights' (W) behind.

    weight_lag: per pp_rank, how many micro-batches may await their W, beside the one that has just run its I. After
        each I the oldest W's run until no more are owed, across the boundary between chunks; after the last, all.
        0 runs each W right behind its I, which then still sends first.

    Each rank keeps the order of its backwards, so the W's of a stage run in the order 0..M-1 too: the gradients of its
    weights are added up as before.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, for the split.
    """
    if len(weight_lag) != len(order) or any(lag < 0 for lag in weight_lag):
        raise UserError(f"the weight lag is {list(weight_lag)}; it takes 0 or more for each of the {len(order)} ranks")
    return [_split(actions, lag) for actions, lag in zip(order, weight_lag)]


def _split(actions: list[Action], lag: int) -> list[Action]:
    split: list[Action] = []
    owed: deque[Action] = deque()
    for action in actions:
        if action.op is not Op.B:
            split.append(action)
            continue
        split.append(action._replace(op=Op.I))
        owed.append(action._replace(op=Op.W))
        if len(owed) > lag:
            split.append(owed.popleft())
    return split + list(owed)


def weight_lags(
    shape: PipelineShape, most: int | None = None, hop: float = 0.0, inputs: float = 1.0, weights: float = 1.0
) -> list[int]:
    """Return for each pp_rank how many micro-batches await their W: ceil(r (i + L) / w), from r to 2 r.

    The last input gradient of pp_rank r takes r steps of i + L to pp_rank 0, with which the step ends; the W's that are
    owed by then fill that time. At most 2 r: so many activations fewer than pp_rank 0 does pp_rank r hold in the eager
    order with one group, so the peak over the ranks stays what it is (groups of g < P - 1 micro-batches raise it by up
    to P - 1 - g). More would gain up to 3% of a step where a W is shorter than (i + L) / 2. Near M = P the longer lag
    for a slow network can be the worse one (choose_weight_lags).
    most: the dial, k: no rank owes more, and none of its activations waits longer. None for no limit.
    hop, inputs, weights: L, i and w, the durations of a message, an I and a W in one unit.
    """
    if most is not None and most < 0:
        raise UserError(f"the weight lag is {most}; at least 0 micro-batches can await the gradients of their weights")
    owed = shape.num_microbatches * shape.num_chunks
    most = owed if most is None else min(most, owed)
    per_rank = min(max(1.0, (inputs + hop) / weights), 2.0) if weights > 0 else 1.0
    return [min(ceil(rank * per_rank - 1e-9), most) for rank in range(shape.pp_size)]


def interleaved_1f1b(shape: PipelineShape, group: int | None = None) -> Schedule:
    """Return the order of Megatron's interleaved 1F1B, from which every comparison starts.

    group: contiguous microbatches per chunk, Megatron's --microbatch-group-size-per-virtual-pipeline-stage;
        None for Megatron's default, the pipeline size.

    Source: megatron.core.pipeline_parallel.schedules, get_schedule_table and get_pp_rank_microbatches.
    Raises UserError for the shapes that Megatron refuses: a group outside [P, M], a last group shorter than P.
    """
    size = shape.pp_size if group is None else group
    if not shape.pp_size <= size <= shape.num_microbatches:
        raise UserError(f"group is {size}; Megatron takes {shape.pp_size} (ranks) to {shape.num_microbatches} (M)")
    rest = shape.num_microbatches % size
    if 0 < rest < shape.pp_size:
        raise UserError(
            f"the last group has {rest} microbatches; Megatron needs 0 or at least {shape.pp_size}.\n"
            f"  Use a multiple of {size} micro-batches instead of {shape.num_microbatches}, or breadth-first: it takes"
            " any number."
        )
    starts = range(0, shape.num_microbatches, size)
    groups = [range(start, min(start + size, shape.num_microbatches)) for start in starts]
    return [
        _alternate(shape, rank, groups, 2 * (shape.pp_size - rank - 1) + (shape.num_chunks - 1) * size)
        for rank in range(shape.pp_size)
    ]


def one_f_one_b(shape: PipelineShape) -> Schedule:
    """Return the order of Megatron's 1F1B without model chunks (num_chunks 1).

    Rank r runs P-r-1 forwards, then one forward and one backward in turn.

    Source: megatron.core.pipeline_parallel.schedules, forward_backward_pipelining_without_interleaving.
    """
    if shape.num_chunks != 1:
        raise UserError(f"1F1B has one model chunk per rank, not {shape.num_chunks}; see interleaved_1f1b")
    groups = [range(shape.num_microbatches)]
    return [_alternate(shape, rank, groups, shape.pp_size - rank - 1) for rank in range(shape.pp_size)]


def forward_only(shape: PipelineShape) -> Schedule:
    """Return the forward half of `breadth_first`, for evaluation."""
    return [
        [Action(stage, Op.F, mb) for stage in shape.stages_on(rank) for mb in range(shape.num_microbatches)]
        for rank in range(shape.pp_size)
    ]


def _groups(shape: PipelineShape, size: int) -> list[range]:
    """Return even groups of at most `size`; fewer and longer ones where a short group could not fill the pipeline."""
    total = shape.num_microbatches
    count = -(-total // size)
    if total // count < min(size, shape.pp_size):
        count = total // size
    bounds = [index * total // count for index in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _alternate(shape: PipelineShape, pp_rank: int, groups: list[range], warmup: int) -> list[Action]:
    """Return `warmup` forwards, then one forward and one backward in turn, then the remaining backwards."""
    stages = shape.stages_on(pp_rank)
    forwards = [Action(stage, Op.F, mb) for group in groups for stage in stages for mb in group]
    backwards = [Action(stage, Op.B, mb) for group in groups for stage in reversed(stages) for mb in group]
    warmup = min(warmup, len(forwards))
    steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]

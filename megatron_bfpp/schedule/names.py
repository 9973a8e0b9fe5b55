"""The one table of schedules: the word of each, its Megatron flags, order, colour, and how others run it.

Every command, picture, table and A/B arm takes words, flags and colours from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .collectives import OURS, Waits
from .ir import Action, Op, PipelineShape, Schedule
from .orders import breadth_first, interleaved_1f1b, one_f_one_b

MEGATRON = Waits(for_forward_sends=True)  # since 0.18 (PR 4047), before the output is freed
TORCH = Waits(
    for_sends=False, for_reductions=True
)  # torch.distributed.pipelining's looped schedules, 2.14, with its DDP

Order = Callable[[PipelineShape, int | None], Schedule]  # shape, micro-batches per group or None for the default


@dataclass(frozen=True)
class Named:
    """A schedule by its word.

    flags: of Megatron and the plugin, that choose it; {M} stands for the number of micro-batches of a step.
    order: None where only the real code of others makes it. chunks: whether a rank has more than one.
    """

    word: str
    about: str
    color: str  # readable on white and on black
    flags: tuple[str, ...]
    order: Order | None
    waits: Waits = OURS
    chunks: bool = True

    def flags_for(self, num_microbatches: int) -> list[str]:
        """The flags that choose this schedule for steps of so many micro-batches."""
        return [flag.format(M=num_microbatches) for flag in self.flags]


_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
_DEFAULT, _OURS = ("--pipeline-schedule", "1f1b"), ("--pipeline-schedule", "breadth-first")
# What Megatron demands with FSDP2: docs/fully_sharded.md.
_SHARDED = ("--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist")

SCHEDULES = {
    each.word: each
    for each in (
        Named("1f1b", "Megatron's 1F1B without chunks", "#9aa0a6", _DEFAULT,
              lambda shape, group: one_f_one_b(shape), MEGATRON, chunks=False),
        Named("interleaved", "Megatron's default with chunks", "#6b7280", _DEFAULT,
              interleaved_1f1b, MEGATRON),
        Named("interleaved-grouped", "the same with one group of all micro-batches", "#3f7f93", (*_DEFAULT, _GROUP, "{M}"),
              lambda shape, group: interleaved_1f1b(shape, shape.num_microbatches), MEGATRON),
        Named("breadth-first", "this plugin", "#d9730d", _OURS, breadth_first),
        Named("breadth-first-late", "this plugin, the paper's plain order", "#e8a35c", (*_OURS, "--breadth-first-backward", "late"),
              lambda shape, group: breadth_first(shape, group, eager_backward=False)),
        Named("breadth-first-megatron", "its order in Megatron's own loop", "#b8925a", (*_OURS, "--breadth-first-engine", "megatron"),
              breadth_first, MEGATRON),
        Named("breadth-first-sharded", "this plugin, fully sharded", "#a3520b", (*_OURS, *_SHARDED), breadth_first),
        Named("torch-interleaved", "torch's Interleaved1F1B", "#7aa5e8", (), None, TORCH),
        Named("torch-looped-bfs", "torch's LoopedBFS", "#2f6fc4", (), None, TORCH),
    )
}  # fmt: skip

# Those that show and plan know; --pipeline-schedule 1f1b of a training run means "1f1b" without chunks, else "interleaved".
ORDERS = ("1f1b", "interleaved", "interleaved-grouped", "breadth-first", "breadth-first-late")


def order_of(word: str, shape: PipelineShape, group: int | None = None) -> Schedule:
    """The order that goes by that word. group: of interleaved and breadth-first; None for their defaults. 1f1b takes num_chunks 1."""
    order = SCHEDULES[word].order
    if order is None:
        raise ValueError(f"the order of {word} is made by torch")
    return order(shape, group)


def waits_of(word: str) -> Waits:
    """What waits for what while that order runs; an order of any other name is run by this plugin."""
    return SCHEDULES[word].waits if word in SCHEDULES else OURS


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

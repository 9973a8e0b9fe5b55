"""The one table of schedules: the word of each, its Megatron flags, order, colour, and how others run it.

Every command, picture, table and A/B arm takes words, flags and colours from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .costs import MEGATRON, OURS, TORCH, UNIT, Costs, Waits, at
from .ir import PipelineShape, Schedule
from .lower import DEFAULT_HOP, aligned, lower
from .orders import breadth_first, interleaved_1f1b, one_f_one_b, split_backward, weight_lags
from .replay import Prediction, replay

Order = Callable[[PipelineShape, int | None], Schedule]  # shape, micro-batches per group or None for the default


@dataclass(frozen=True)
class Named:
    """A schedule by its word.

    flags: those of Megatron and the plugin that choose it; {M} stands for the number of micro-batches of a step.
    order: None where only the code of others makes it. chunks: whether a rank has more than one.
    is_split: whether `order_of` then splits every backward of the order.
    """

    word: str
    about: str
    color: str  # contrast of at least 3:1 with white and with near-black (#15181c)
    flags: tuple[str, ...]
    order: Order | None
    waits: Waits = OURS
    chunks: bool = True
    is_split: bool = False

    def flags_for(self, num_microbatches: int) -> list[str]:
        """Return the flags that choose this schedule for steps of `num_microbatches` micro-batches."""
        return [flag.format(M=num_microbatches) for flag in self.flags]


_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
_DEFAULT, _OURS = ("--pipeline-schedule", "1f1b"), ("--pipeline-schedule", "breadth-first")
_DEFERRED = ("--breadth-first-weight-gradients", "deferred")
_LATE, _ENGINE = ("--breadth-first-backward", "late"), ("--breadth-first-engine", "megatron")
# Megatron demands the last three with the first: docs/guide/fully_sharded.md.
_SHARDED = ("--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist")

SCHEDULES = {
    each.word: each
    for each in (
        Named("1f1b", "Megatron's 1F1B without chunks", "#8d9299", _DEFAULT,
              lambda shape, group: one_f_one_b(shape), MEGATRON, chunks=False),
        Named("interleaved", "Megatron's default with chunks", "#6b7280", _DEFAULT, interleaved_1f1b, MEGATRON),
        Named("interleaved-grouped", "the same with one group of all micro-batches", "#3f7f93",
              (*_DEFAULT, _GROUP, "{M}", "--overlap-p2p-communication-warmup-flush"),
              lambda shape, group: interleaved_1f1b(shape, shape.num_microbatches), MEGATRON),
        Named("breadth-first", "this plugin", "#d9730d", _OURS, breadth_first),
        Named("breadth-first-late", "this plugin, the paper's plain order", "#a98a00", (*_OURS, *_LATE),
              lambda shape, group: breadth_first(shape, group, eager_backward=False)),
        Named("breadth-first-megatron", "its order in Megatron's own loop", "#8c6f4e", (*_OURS, *_ENGINE),
              breadth_first, MEGATRON),
        Named("breadth-first-sharded", "this plugin, fully sharded", "#a3520b", (*_OURS, *_SHARDED), breadth_first),
        Named("breadth-first-deferred", "this plugin, the weights' gradients deferred", "#d6453d", (*_OURS, *_DEFERRED),
              breadth_first, is_split=True),
        Named("torch-interleaved", "torch's Interleaved1F1B", "#6a94dc", (), None, TORCH),
        Named("torch-looped-bfs", "torch's LoopedBFS", "#2f6fc4", (), None, TORCH),
        Named("torch-zero-bubble", "torch's InterleavedZeroBubble", "#7d5fd0", (), None, TORCH, is_split=True),
    )
}  # fmt: skip

# The words that show and plan take.
DEFERRED = "breadth-first-deferred"
ORDERS = ("1f1b", "interleaved", "interleaved-grouped", "breadth-first", "breadth-first-late", DEFERRED)


def word_of(
    flag: str, pp_size: int, num_chunks: int, num_microbatches: int, group: int | None = None, *,
    backward: str = "eager", engine: str = "plan", weight_gradients: str = "with-backward", is_sharded: bool = False,
) -> str:  # fmt: skip
    """Return the word for the schedule of a job.

    flag: the value of --pipeline-schedule, where 1f1b stands for all of Megatron's own.
    group: micro-batches per group of Megatron's interleaved order; None for its default, the pipeline size.
    backward, engine, weight_gradients: the values of --breadth-first-backward, --breadth-first-engine and
        --breadth-first-weight-gradients; of the last one what auto has come to.
    The word has an ending for each option, so it can have several that SCHEDULES has only one by one, such as
    breadth-first-late-sharded.
    """
    if flag != "1f1b":
        endings = (
            ("-late", backward == "late"), ("-deferred", weight_gradients == "deferred"),
            ("-megatron", engine == "megatron"), ("-sharded", is_sharded),
        )  # fmt: skip
        return flag + "".join(ending for ending, applies in endings if applies)
    if num_chunks == 1:
        return "1f1b"
    return "interleaved-grouped" if group == num_microbatches > pp_size else "interleaved"


def order_of(
    word: str, shape: PipelineShape, group: int | None = None, weight_lag: Sequence[int] | None = None
) -> Schedule:
    """Return the order that a word of SCHEDULES names.

    group: micro-batches per group of interleaved and breadth-first; None for their defaults. 1f1b takes num_chunks 1.
    weight_lag: of a schedule that is_split, see `split_backward`; None for `weight_lags` without a network.
    """
    named = SCHEDULES[word]
    if named.order is None:
        raise ValueError(f"the order of {word} is made by torch")
    order = named.order(shape, group)
    if not named.is_split:
        return order
    return split_backward(order, weight_lags(shape) if weight_lag is None else weight_lag)


def waits_of(word: str) -> Waits:
    """Return what a runtime waits for in that schedule; this plugin runs an order of any other name."""
    return SCHEDULES[word].waits if word in SCHEDULES else OURS


def predict(
    word: str, order: Schedule, shape: PipelineShape, costs: Costs = UNIT, resident_chunks: int | None = None,
    hop: float = DEFAULT_HOP, connections: int | None = None,
) -> tuple[Schedule, Prediction]:  # fmt: skip
    """Return the plan of `order`, and what `replay` predicts of it.

    hop: for which this plugin places receives. Megatron's loops post a receive one action ahead of need, which is where
    it stands if placed for the messages as they are; on queues of their own an earlier one does the same. With chunks
    they launch collectives where --align-grad-reduce and --align-param-gather have them, and the first chunk's as one.
    """
    waits = waits_of(word)
    if waits is MEGATRON:
        hop = max(costs.messages(shape.pp_size)) / at(costs.forward, 0) if connections == 1 else 0.0
    plan = lower(order, shape, resident_chunks, hop)
    if waits is MEGATRON and shape.num_chunks > 1 and resident_chunks is None:
        plan, costs = aligned(plan, shape), replace(costs, buckets=1)
    return plan, replay(plan, shape, costs, waits, connections)

"""The plan of a step: made and checked once per shape, for all ranks, before anything runs."""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from . import Action, Op, PipelineShape, Schedule, breadth_first, check, forward_only, lower, simulate
from .costs import Times
from .formats import digest
from .ir import BACKWARDS, PASSES, RECEIVES, SEND_WINDOW
from .lower import DEFAULT_HOP
from .orders import weight_lags
from .sharding import count_gathers

LEAST_GAIN = 0.02  # of a step: for less, `auto` does not take the memory of a split backward


@dataclass(frozen=True)
class Plan:
    """A checked plan of all ranks, and what is reported of it."""

    actions: Schedule
    digest: str
    bubble_fraction: float
    gathers: int  # of chunks, per rank
    peak_live_activations: list[int]  # per rank; an owed W counts as one
    peak_owed_weight_gradients: list[int]  # per rank; zeros unless the backward is split

    @property
    def is_split(self) -> bool:
        """Return whether backwards are split: an I owes the weights' gradients to a W."""
        return any(self.peak_owed_weight_gradients)


@lru_cache(maxsize=64)
def plan_of(
    shape: PipelineShape,
    group_size: int | None,
    eager: bool,
    evaluation: bool,
    resident_chunks: int | None = None,
    hop: float | None = DEFAULT_HOP,
    weight_lag: tuple[int, ...] | None = None,
) -> Plan:
    """Return the breadth-first plan of a shape. resident_chunks: None unless fully sharded. hop: see `add_send_recv`.

    weight_lag: see `split_backward`; None for whole backwards.
    Raises ScheduleError if the plan is unsound.
    """
    group = None if group_size is None else min(group_size, shape.num_microbatches)
    order = forward_only(shape) if evaluation else breadth_first(shape, group, eager, weight_lag)
    timeline = simulate(order, shape)
    actions = lower(order, shape, resident_chunks, hop)
    check(actions, shape, evaluation, resident_chunks)
    return Plan(
        actions, digest(actions), timeline.bubble_fraction, count_gathers(actions[0]),
        timeline.peak_live_activations(), timeline.peak_owed_weight_gradients(),
    )  # fmt: skip


@lru_cache(maxsize=64)
def choose_weight_lags(
    shape: PipelineShape, group: int | None, eager: bool, *, most: int | None = None, hop: float = DEFAULT_HOP,
    inputs: float = 1.0, weights: float = 1.0, forward: float = 1.0,
) -> tuple[int, ...]:  # fmt: skip
    """Return for each pp_rank how many micro-batches await their W: the lags of `weight_lags` with the shortest step.

    Those for the hop, those for none, and lag r on pp_rank r are simulated. Near M = P every hop delays the step on all
    ranks, and the longer lags for it can make it longer. Of equal steps the one that owes least.
    group, eager: as in `breadth_first`. most, hop, inputs, weights: as in `weight_lags`. forward: f, in the same unit.
    """
    candidates = {
        tuple(weight_lags(shape, most, *times)) for times in ((hop, inputs, weights), (0.0, inputs, weights), ())
    }
    if len(candidates) == 1:
        return candidates.pop()
    orders = {lags: breadth_first(shape, group, eager, lags) for lags in candidates}

    def cost(lags: tuple[int, ...]) -> tuple[float, int]:
        timeline = simulate(orders[lags], shape, forward, inputs + weights, hop, weights)
        return round(timeline.step_time, 9), sum(lags)  # rounded: sums of the same times in another order are equal

    return min(candidates, key=cost)


@lru_cache(maxsize=64)
def gain_of_split(
    shape: PipelineShape, group: int | None, eager: bool, lags: tuple[int, ...], forward: float, inputs: float,
    weights: float, hop: float,
) -> float:  # fmt: skip
    """Return the part of the step that splitting its backwards saves, in a simulation; below 0 where it costs.

    forward, inputs, weights: f, i, w; a whole backward takes i + w. hop: of a message, in the same unit.
    """
    whole, split = (
        simulate(breadth_first(shape, group, eager, each), shape, forward, inputs + weights, hop, weights).step_time
        for each in (None, lags)
    )
    return 1 - split / whole


def lags_for(
    weight_gradients: str, shape: PipelineShape, group: int | None, eager: bool, most: int | None, hop: float,
    times: Times,
) -> tuple[tuple[int, ...] | None, float]:  # fmt: skip
    """Return how many micro-batches await their W on each rank, None for whole backwards, and what a split gains.

    The gain is the part of a step that a simulation saves; `auto` splits from LEAST_GAIN on.
    weight_gradients: with-backward, deferred or auto. hop: in forwards. group, eager, most: as in `choose_weight_lags`.
    """
    if weight_gradients == "with-backward":
        return None, 0.0
    forward, inputs, weights = times
    group = None if group is None else min(group, shape.num_microbatches)
    lags = choose_weight_lags(
        shape, group, eager, most=most, hop=hop * forward, inputs=inputs, weights=weights, forward=forward
    )
    gain = gain_of_split(shape, group, eager, lags, forward, inputs, weights, hop * forward)
    return (lags if weight_gradients == "deferred" or gain >= LEAST_GAIN else None), gain


def most_messages(actions: list[Action], shape: PipelineShape) -> int:
    """Return the most tensors that a rank holds for messages at a time, beside its live activations.

    actions: of the rank, from a lowered plan. A buffer counts from its receive on: that of an input until its forward
    starts, whose activation it then is, and that of a gradient until its backward ends. A result that is sent counts
    from the action that makes it until its send is waited for, SEND_WINDOW compute actions later; an output at the
    latest until its own backward.

    Most of them does not depend on the number of micro-batches, but where that exceeds the number of ranks by N, the
    first rank keeps N inputs, and the last rank N gradients, that have come while it still runs the chunk before.
    """
    received = most = 0
    sent: deque[list[Action]] = deque([[]], SEND_WINDOW)  # as in runtime/p2p.py
    for action in actions:
        stage, op, microbatch = action
        if op in RECEIVES:
            received += 1
            most = max(most, received + sum(map(len, sent)))
        if op not in PASSES:
            continue
        is_first, is_last = stage == 0, stage == shape.num_stages - 1
        if op is Op.F:
            received -= not is_first
            made = [] if is_last else [Action(stage, Op.F, microbatch)]
        else:
            for results in sent:
                if (output := Action(stage, Op.F, microbatch)) in results:
                    results.remove(output)
            made = [] if is_first else [action]
        sent.append(made)
        most = max(most, received + sum(map(len, sent)))
        received -= op in BACKWARDS and not is_last
    return most

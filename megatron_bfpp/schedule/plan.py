"""The plan of a step: made and checked once per shape, for all ranks, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import PipelineShape, Schedule, breadth_first, check, forward_only, lower, simulate
from .buffers import after_sends
from .formats import digest
from .sharding import count_gathers


@dataclass(frozen=True)
class Plan:
    """A checked plan of all ranks, and what is reported of it."""

    actions: Schedule
    digest: str
    bubble_fraction: float
    gathers: int  # of chunks, per rank
    peak_live_activations: list[int]


@lru_cache(maxsize=64)
def plan_of(
    shape: PipelineShape,
    group_size: int | None,
    eager: bool,
    evaluation: bool,
    resident_chunks: int | None = None,
    variable_shapes: bool = False,
) -> Plan:
    """Return the breadth-first plan of a shape. resident_chunks: None unless fully sharded.

    variable_shapes: a receive is posted once its sender can tell the sizes.
    Raises ScheduleError if the plan is unsound.
    """
    group = None if group_size is None else min(group_size, shape.num_microbatches)
    order = forward_only(shape) if evaluation else breadth_first(shape, group, eager)
    timeline = simulate(order, shape)
    actions = lower(order, shape, timeline, resident_chunks)
    if variable_shapes:
        actions = after_sends(actions, shape)
    check(actions, shape, evaluation, resident_chunks)
    peaks = timeline.peak_live_activations()
    return Plan(actions, digest(actions), timeline.bubble_fraction, count_gathers(actions[0]), peaks)

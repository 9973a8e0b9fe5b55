"""Full sharding in a plan: which chunks of a rank hold gathered parameters, and when.

A rank keeps its parameters sharded over its data-parallel group. A chunk can run only while it is gathered, and at most
`resident_chunks` of a rank's chunks may be gathered at a time: 1 takes the least memory, 2 hides a gather behind the
chunk before, all of them is ZeRO-2 (each chunk gathered once per step, gradients and optimizer sharded).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..console.errors import UserError
from .ir import PASSES, Action, Op, PipelineShape, Schedule
from .simulate import ScheduleError


@dataclass(slots=True)
class _Place:
    """Room for one gathered chunk: what it holds, and the runs (see `_changes`) that used it last and use it next."""

    stage: int | None = None
    last_use: int = -1
    next_use: float = math.inf


def add_sharding(plan: Schedule, shape: PipelineShape, resident_chunks: int) -> Schedule:
    """Gather every chunk before it runs; free it after its last use, or where another chunk needs its place.

    The chunk to be freed is the one needed last (Belady 1966), so no plan with as many places has fewer gathers. A
    gather stands where the chunk gathered before it begins to run, or later if its place is still in use: at most one
    gather is under way ahead of need. The second stands behind the first compute action, as in `lower.add_unshard`.
    Breadth-first with all micro-batches in one group has 2V - resident_chunks gathers per rank, whatever M is: the last
    chunks stay gathered between forward and backward. A W needs no parameters: a chunk is freed after its last I.
    """
    if resident_chunks < 1:
        raise UserError(f"resident_chunks is {resident_chunks}; a chunk can only run while it is gathered")
    return [_sharded(actions, resident_chunks) for actions in plan]


def _sharded(actions: list[Action], places: int) -> list[Action]:
    computes = [position for position, action in enumerate(actions) if action.op in PASSES]
    runs = [(stage, next(run)) for stage, run in groupby(computes, key=lambda position: actions[position].stage)]
    starts = [0, *(_before_weights(actions, position) for position in (*(at for _, at in runs[1:]), len(actions)))]
    changes: dict[int, list[Action]] = defaultdict(list)
    for run, action in _changes([stage for stage, _ in runs], places):
        is_second = starts[run] == 0 and len(changes[0]) == 1 and starts[1] not in computes[:2]
        changes[computes[1] if is_second and len(computes) > 1 else starts[run]].append(action)
    lowered: list[Action] = []
    for position, action in enumerate(actions):
        lowered += [*changes[position], action]
    return lowered + changes[len(actions)]


def _before_weights(actions: list[Action], position: int) -> int:
    """Return the place of the first W between `position` and the compute action before it that is none."""
    place = position
    while position and actions[position - 1].op not in PASSES:
        position -= 1
        place = position if actions[position].op is Op.W else place
    return place


def _changes(runs: list[int], places: int) -> list[tuple[int, Action]]:
    """Return (run, UNSHARD or RESHARD to put before it), in order; run len(runs) stands for the end.

    runs: the stage of each run of a rank; a run is a series of its compute actions of one stage, W's left out.
    """
    room = [_Place() for _ in range(places)]
    following = _following_uses(runs)
    changes: list[tuple[int, Action]] = []
    gathered_for = 0  # the run that the last gather was for
    for run, stage in enumerate(runs):
        place = next((place for place in room if place.stage == stage), None)
        if place is None:
            place = max(room, key=lambda place: (place.next_use, -place.last_use))
            start = max(place.last_use + 1, gathered_for)
            if place.stage is not None:
                changes.append((start, Action(place.stage, Op.RESHARD)))
            changes.append((start, Action(stage, Op.UNSHARD)))
            place.stage, gathered_for = stage, run
        place.last_use, place.next_use = run, following[run]
        if place.next_use == math.inf:
            changes.append((run + 1, Action(stage, Op.RESHARD)))
            place.stage = None
    # Frees come first, so that the places suffice at every moment.
    return sorted(changes, key=lambda change: (change[0], change[1].op is Op.UNSHARD))


def _following_uses(runs: list[int]) -> list[float]:
    """Return for each run the next one of the same stage; infinity if there is none."""
    found: list[float] = []
    coming: dict[int, int] = {}
    for run in range(len(runs) - 1, -1, -1):
        found.append(coming.get(runs[run], math.inf))
        coming[runs[run]] = run
    return found[::-1]


def is_sharded(plan: Schedule) -> bool:
    """Return whether a plan frees gathered parameters; a replicated one gathers each chunk once and keeps it."""
    return any(action.op is Op.RESHARD for actions in plan for action in actions)


def check_sharding(plan: Schedule, resident_chunks: int) -> None:
    """Raise ScheduleError unless each chunk is gathered while it runs, none in vain, and no more than may be.

    A gather counts from its launch. At the end of a step nothing is gathered: the optimizer changes the shards.
    """
    for pp_rank, actions in enumerate(plan):
        gathered: dict[int, bool] = {}  # stage -> whether it has run since
        for step, action in enumerate(actions):
            complaint = _complaint(action, gathered, resident_chunks)
            if complaint is not None:
                raise ScheduleError(f"pp_rank {pp_rank}: step {step} {action} {complaint}")
        for stage in gathered:
            raise ScheduleError(f"pp_rank {pp_rank}: {Action(stage, Op.RESHARD)} is missing at the end of the step")


def _complaint(action: Action, gathered: dict[int, bool], resident_chunks: int) -> str | None:
    """Return what is wrong with running `action` now, or None; keep `gathered` up to date."""
    stage, op, _ = action
    if op is Op.UNSHARD:
        if stage in gathered:
            return "gathers what is gathered"
        if len(gathered) == resident_chunks:
            return f"is one gathered chunk more than the {resident_chunks} that may be"
        gathered[stage] = False
    elif op in PASSES:
        if stage not in gathered:
            return f"runs while its parameters are sharded: {Action(stage, Op.UNSHARD)} is missing before it"
        gathered[stage] = True
    elif op is Op.RESHARD and not gathered.pop(stage, False):
        return "gives up what is not gathered, or has not run since it was"
    return None


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes kept per parameter. The defaults are for fp32 and Adam."""

    gathered: int = 4  # the parameter; 2 in bf16
    summed: int = 4  # its gradient, unreduced: added up in fp32 also for bf16
    shard: int = 12  # the parameter and the optimizer's state; 14 in bf16, with an fp32 copy
    reduced: int = 4  # its reduced gradient, in fp32 also for bf16


def peak_parameter_bytes(
    actions: list[Action], shape: PipelineShape, parameters: Sequence[int], replicas: int, each: ParameterBytes
) -> float:
    """Return the most bytes that parameters, gradients and optimizer take on a fully sharded rank during a step.

    actions: the rank's plan. parameters: how many each of its chunks has. replicas: that they are sharded over.
    The shards of all parameters are always there. Beside them, at any moment: the gathered chunks, counted from the
    launch of their gathers; the gradients of chunks between their first B or W and their reduction; those of the
    chunk reduced last, which are kept until the next is reduced; and the shards of the reduced ones. Where backwards
    are split, an I makes the gradients of norms, biases and the embedding alone: they count with the first W.
    With 2 resident chunks of n parameters each, P of them on the rank, in fp32: 12 P / replicas + 2 (4 + 4) n, and
    4 n / replicas for each chunk but the first.
    """
    gathered: set[int] = set()
    summed: set[int] = set()
    reduced: set[int] = set()
    leaving: set[int] = set()  # the chunk that was reduced last
    entered = {Op.UNSHARD: gathered, Op.B: summed, Op.W: summed, Op.REDUCE_GRAD: reduced}

    def elements(stages: set[int]) -> int:
        return sum(parameters[shape.chunk_of(stage)] for stage in stages)

    peak = 0.0
    for stage, op, _ in actions:
        if op is Op.RESHARD:
            gathered.discard(stage)
        elif op in entered:
            entered[op].add(stage)
        held = elements(gathered) * each.gathered + elements(summed | leaving) * each.summed
        peak = max(peak, held + elements(reduced) * each.reduced / replicas)
        if op is Op.REDUCE_GRAD:  # only now the reduction before this one is waited for
            summed.discard(stage)
            leaving = {stage}
    return sum(parameters) * each.shard / replicas + peak


def count_gathers(actions: list[Action]) -> int:
    """Return how often a rank gathers a chunk in a step."""
    return sum(action.op is Op.UNSHARD for action in actions)

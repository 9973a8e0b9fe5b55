"""Predict when every action of a schedule runs.

The simulation follows data dependencies and the order of each rank. Given equal stages and no network it reproduces
the exact step time of the looped schedules, (V-1) max(M, P) + M + P - 1 in units of forward plus backward, also for
M < P, where the textbook bubble (P-1)/(M V) does not hold.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .ir import COMPUTE, Action, Op, PipelineShape, Schedule

Key = tuple[int, Op, int | None]  # equals an Action as the key of a dict, and is made in a quarter of the time


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, or that would deadlock."""


class Span(NamedTuple):
    """One compute action of one rank, in the units of the durations given to `simulate`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The times at which every rank computes."""

    shape: PipelineShape
    spans: list[list[Span]]  # [pp_rank], in running order
    # 1F1B without chunks takes the chunks of a rank as one stage, with the activations of all of them.
    chunks_per_stage: int = 1

    @property
    def step_time(self) -> float:
        return max(spans[-1].end for spans in self.spans if spans)

    @property
    def bubble_fraction(self) -> float:
        """Return 1 - busy / (pp_size * step time), over all ranks."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1 - busy / (self.shape.pp_size * self.step_time)

    def peak_live_activations(self) -> list[int]:
        """Return, per rank, the most pairs of microbatch and chunk that await their backward at a time."""
        peaks = []
        for spans in self.spans:
            live = peak = 0
            for span in spans:
                live += 1 if span.action.op is Op.F else -1
                peak = max(peak, live)
            peaks.append(peak * self.chunks_per_stage)
        return peaks


def simulate(
    schedule: Schedule, shape: PipelineShape, forward: float = 1.0, backward: float = 2.0, hop: float = 0.0
) -> Timeline:
    """Run an order or a lowered plan; communication actions are skipped, a message between ranks takes `hop`.

    forward, backward, hop: durations in one unit of the caller's choice, the same for every stage.
    Raises ScheduleError with every rank's next action where no rank can go on.
    """
    orders = [[action for action in actions if action.op in COMPUTE] for actions in schedule]
    spans: list[list[Span]] = [[] for _ in orders]
    last_stage = shape.num_stages - 1
    ends: dict[Key, float] = {}
    waiting: dict[Key, list[int]] = {}
    clock = [0.0] * len(orders)
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        order, done, now = orders[rank], spans[rank], clock[rank]
        for position in range(len(done), len(order)):
            action = order[position]
            need = dependency(action, last_stage)
            if need is not None:
                arrival = ends.get(need)
                if arrival is None:
                    waiting.setdefault(need, []).append(rank)
                    break
                if need[0] != action.stage:
                    arrival += hop
                now = max(now, arrival)
            start = now
            now += forward if action.op is Op.F else backward
            ends[action] = now
            done.append(Span(action, start, now))
            if action in waiting:
                ready += waiting.pop(action)
        clock[rank] = now
    if any(len(done) < len(order) for done, order in zip(spans, orders)):
        raise ScheduleError(_stuck(orders, [len(done) for done in spans], shape))
    return Timeline(shape, spans)


def dependency(action: Action, last_stage: int) -> Key | None:
    """Return the compute action whose result `action` (F or B) needs, beside those before it on its own rank."""
    stage, op, microbatch = action
    if op is Op.F:
        return (stage - 1, op, microbatch) if stage > 0 else None
    return (stage, Op.F, microbatch) if stage == last_stage else (stage + 1, op, microbatch)


def _stuck(orders: Schedule, positions: list[int], shape: PipelineShape) -> str:
    lines = ["no rank can run its next action:"]
    for rank, (order, position) in enumerate(zip(orders, positions)):
        if position < len(order):
            key = dependency(order[position], shape.num_stages - 1)
            assert key is not None, "an action without dependency always runs"
            need = Action(*key)
            where = f"of pp_rank {shape.rank_of(need.stage)}"
            lines.append(f"  pp_rank {rank}: step {position} {order[position]} waits for {need} {where}")
    return "\n".join(lines)

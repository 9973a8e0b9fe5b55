"""Predict when every action of a schedule runs. Standard library only.

The simulation follows data dependencies and the order of each rank. Given equal stages and no network it reproduces
the exact step time of the looped schedules, (V-1) max(M, P) + M + P - 1 in units of forward plus backward, also for
M < P, where the textbook bubble (P-1)/(M V) does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ir import COMPUTE, Action, Op, PipelineShape, Schedule


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order, or that would deadlock."""


@dataclass(frozen=True)
class Span:
    """One compute action of one rank, in the units of the durations given to `simulate`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every rank computes: spans[pp_rank] in running order."""

    shape: PipelineShape
    spans: list[list[Span]]

    @property
    def step_time(self) -> float:
        return max(spans[-1].end for spans in self.spans if spans)

    @property
    def bubble_fraction(self) -> float:
        """1 - busy / (pp_size * step time), over all ranks."""
        busy = sum(span.end - span.start for spans in self.spans for span in spans)
        return 1 - busy / (self.shape.pp_size * self.step_time)

    def peak_live_activations(self) -> list[int]:
        """Per rank, the most microbatch-and-chunk pairs that await their backward at one time."""
        peaks = []
        for spans in self.spans:
            live = peak = 0
            for span in spans:
                live += 1 if span.action.op is Op.F else -1
                peak = max(peak, live)
            peaks.append(peak)
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
    ends: dict[Action, float] = {}
    waiting: dict[Action, list[int]] = {}
    clock = [0.0] * len(orders)
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        order, done = orders[rank], spans[rank]
        for action in order[len(done) :]:
            need = dependency(action, shape)
            if need is not None and need not in ends:
                waiting.setdefault(need, []).append(rank)
                break
            arrival = 0.0 if need is None else ends[need] + (0.0 if need.stage == action.stage else hop)
            start = max(clock[rank], arrival)
            clock[rank] = ends[action] = start + (forward if action.op is Op.F else backward)
            done.append(Span(action, start, clock[rank]))
            ready.extend(waiting.pop(action, ()))
    if any(len(done) < len(order) for done, order in zip(spans, orders)):
        raise ScheduleError(_stuck(orders, [len(done) for done in spans], shape))
    return Timeline(shape, spans)


def dependency(action: Action, shape: PipelineShape) -> Action | None:
    """The compute action whose result `action` (F or B) needs, beside those before it on its own rank."""
    if action.op is Op.F:
        return Action(action.stage - 1, Op.F, action.microbatch) if action.stage > 0 else None
    if action.stage == shape.num_stages - 1:
        return Action(action.stage, Op.F, action.microbatch)
    return Action(action.stage + 1, Op.B, action.microbatch)


def _stuck(orders: Schedule, positions: list[int], shape: PipelineShape) -> str:
    lines = ["no rank can run its next action:"]
    for rank, (order, position) in enumerate(zip(orders, positions)):
        if position < len(order):
            need = dependency(order[position], shape)
            assert need is not None, "an action without dependency always runs"
            where = f"of pp_rank {shape.rank_of(need.stage)}"
            lines.append(f"  pp_rank {rank}: step {position} {order[position]} waits for {need} {where}")
    return "\n".join(lines)

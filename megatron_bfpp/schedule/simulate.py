"""Predict when every action of a schedule runs.

The simulation follows data dependencies and the order of each rank. Given equal stages and no network it reproduces
the exact step time of the looped schedules, (V-1) max(M, P) + M + P - 1 in units of forward plus backward, also for
M < P, where the textbook bubble (P-1)/(M V) does not hold.
"""

from dataclasses import dataclass
from itertools import accumulate
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
        """Return, per rank, the most pairs of microbatch and chunk that await their backward at a time, W's included.

        A pair whose W is still owed counts in full, though it keeps the inputs of linears alone.
        """
        return self._peaks({Op.F: 1, Op.B: -1, Op.W: -1})

    def peak_owed_weight_gradients(self) -> list[int]:
        """Return, per rank, the most pairs of microbatch and chunk that have run their I and await their W."""
        return self._peaks({Op.I: 1, Op.W: -1})

    def _peaks(self, changes: dict[Op, int]) -> list[int]:
        peaks = []
        for spans in self.spans:
            live = accumulate(changes.get(span.action.op, 0) for span in spans)
            peaks.append(max(live, default=0) * self.chunks_per_stage)
        return peaks


def simulate(
    schedule: Schedule, shape: PipelineShape, forward: float = 1.0, backward: float = 2.0, hop: float = 0.0,
    weights: float | None = None,
) -> Timeline:  # fmt: skip
    """Run an order or a lowered plan; communication actions are skipped, a message between ranks takes `hop`.

    forward, backward, hop: durations in one unit of the caller's choice, the same for every stage.
    weights: the part of a backward that its W takes where it is split; None for half of it.
    Raises ScheduleError with every rank's next action where no rank can go on.
    """
    orders = [[action for action in actions if action.op in COMPUTE] for actions in schedule]
    spans: list[list[Span]] = [[] for _ in orders]
    last_stage = shape.num_stages - 1
    ends: dict[Key, float] = {}
    waiting: dict[Key, list[int]] = {}
    weights = backward / 2 if weights is None else weights
    durations = {Op.F: forward, Op.B: backward, Op.I: backward - weights, Op.W: weights}
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
            now += durations[action.op]
            made = result(action)
            ends[made] = now
            done.append(Span(action, start, now))
            if made in waiting:
                ready += waiting.pop(made)
        clock[rank] = now
    if any(len(done) < len(order) for done, order in zip(spans, orders)):
        raise ScheduleError(_stuck(orders, [len(done) for done in spans], shape))
    return Timeline(shape, spans)


def dependency(action: Action, last_stage: int) -> Key | None:
    """Return the result that `action` needs, as `result` names it, beside those before it on its own rank."""
    stage, op, microbatch = action
    if op is Op.F:
        return (stage - 1, op, microbatch) if stage > 0 else None
    if op is Op.W:
        return stage, Op.B, microbatch
    return (stage, Op.F, microbatch) if stage == last_stage else (stage + 1, Op.B, microbatch)


def result(action: Action) -> Key:
    """Return the name of the result that `dependency` needs: a B and an I give the same, the input's gradient."""
    return action._replace(op=Op.B) if action.op is Op.I else action


def _stuck(orders: Schedule, positions: list[int], shape: PipelineShape) -> str:
    lines = ["no rank can run its next action:"]
    split = {action.stage for order in orders for action in order if action.op is Op.I}
    for rank, (order, position) in enumerate(zip(orders, positions)):
        if position < len(order):
            key = dependency(order[position], shape.num_stages - 1)
            assert key is not None, "an action without dependency always runs"
            need = Action(*key)
            if need.op is Op.B and need.stage in split:
                need = need._replace(op=Op.I)
            where = f"of pp_rank {shape.rank_of(need.stage)}"
            lines.append(f"  pp_rank {rank}: step {position} {order[position]} waits for {need} {where}")
    return "\n".join(lines)

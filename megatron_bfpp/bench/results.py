"""The results of `bfpp bench` as a table, Markdown and JSON: ratios, which hold elsewhere, not times, which do not."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..integration.flags.settings import Settings
from ..schedule import Action, Op, PipelineShape, Schedule, lower, one_f_one_b
from ..schedule.costs import MEGATRON, TORCH, Costs, at
from ..schedule.names import SCHEDULES, order_of, predict
from ..schedule.replay import replay
from .case import SHARDED, Case

REFERENCE = "interleaved"  # Megatron's default; the arm that the others are compared with


@dataclass(frozen=True)
class Result:
    """The steps of one arm in one case. Times in seconds."""

    arm: str
    case: Case
    step_times_s: list[float]
    free_step_times_s: list[float] | None = None  # with data-parallel collectives that took no time; None without any
    plan: Schedule | None = None  # torch's own, of its arms: computation, sends and receives

    @property
    def row(self) -> tuple[PipelineShape, str]:
        """The shape and the name of the network, of which a table has a row or a block."""
        return self.case.shape, self.case.network

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_times_s)

    @property
    def spread(self) -> float:
        """(longest - shortest) / median."""
        return (max(self.step_times_s) - min(self.step_times_s)) / self.median_s

    @property
    def to_bound(self) -> float:
        """The step over the lower bound of whole backwards, which a split one can come below."""
        return self.median_s / lower_bound_s(self.case.shape, self.case.costs)

    @property
    def is_split(self) -> bool:
        return SCHEDULES[self.arm].is_split

    @property
    def exposed_s(self) -> float | None:
        """Return the time that data-parallel collectives add to the step; None without any."""
        return None if self.free_step_times_s is None else self.median_s - statistics.median(self.free_step_times_s)

    @property
    def exposed(self) -> float | None:
        """Return it in units of the collectives of one chunk: its reduction and its gather."""
        return None if self.exposed_s is None else self.exposed_s / (self.case.costs.reduction + self.case.costs.gather)

    @property
    def predicted_s(self) -> float | None:
        """The simulated step time of the arm's plan, or of a plan in its order.

        None for torch's arms with one hardware queue: all messages of a rank are batches on one communicator.
        """
        case, shape, costs = self.case, self.case.shape, self.case.costs
        if self.plan is not None and case.connections == 1:
            return None
        if self.plan is not None:
            # torch's DDP reduces and gathers in one all-reduce. Split, the first stage's W is all of a backward.
            weights = [at(costs.backward, 0), *[costs.of(Action(0, Op.W))] * (shape.num_stages - 1)]
            costs = replace(costs, weights=weights, gather=0.0, reduction=costs.reduction + costs.gather)
            return replay(self.plan, shape, costs, TORCH, case.connections).step_time
        if not SCHEDULES[self.arm].chunks:
            return _one_f_one_b_s(shape, costs, case.connections)
        if self.is_split:
            ours = Settings(
                "breadth-first", hop=case.hop, weight_gradients="deferred", weight_lag=case.weight_lag
            )  # fmt: skip
            return replay(ours.plan_of(shape).actions, shape, costs, connections=case.connections).step_time
        resident = Settings("breadth-first").resident_chunks_of(shape.num_chunks) if self.arm == SHARDED else None
        order = order_of(self.arm, shape)
        return predict(self.arm, order, shape, costs, resident, case.hop, case.connections)[1].step_time


def _one_f_one_b_s(shape: PipelineShape, costs: Costs, connections: int) -> float:
    """Simulate 1F1B: the chunks of a rank in a row are its one stage; Megatron's hooks gather it as it starts."""
    whole, chunks = PipelineShape(shape.pp_size, 1, shape.num_microbatches), shape.num_chunks
    costs = replace(
        costs, forward=at(costs.forward, 0) * chunks, backward=at(costs.backward, 0) * chunks,
        gather=costs.gather * chunks, reduction=costs.reduction * chunks, buckets=costs.buckets * chunks,
    )  # fmt: skip
    plan = [[each for each in actions if each.op is not Op.UNSHARD] for actions in lower(one_f_one_b(whole), whole)]
    return replay(plan, whole, costs, MEGATRON, connections).step_time


def lower_bound_s(shape: PipelineShape, costs: Costs, is_split: bool = False) -> float:
    """Return a time that no schedule with looping placement and equal stages beats.

    is_split: its backwards are split, so that what other ranks wait for takes part of their time.

    Before it stands the gather of the first bucket of the first stage, after it the reduction of the last one.
    """
    collectives = (costs.gather + costs.reduction) / costs.buckets
    return max(_split_bounds(shape, costs) if is_split else _whole_bounds(shape, costs)) + collectives


def _whole_bounds(shape: PipelineShape, costs: Costs) -> tuple[float, ...]:
    """Return the work of the last rank between fill and drain, and the way of one micro-batch there and back."""
    both, messages = at(costs.forward, 0) + at(costs.backward, 0), costs.messages(shape.pp_size)
    ring, way = sum(messages), sum(messages[:-1])
    work = shape.num_microbatches * shape.num_chunks * both + (shape.pp_size - 1) * both + 2 * way
    return work, shape.num_stages * both + 2 * ((shape.num_chunks - 1) * ring + way)


def _split_bounds(shape: PipelineShape, costs: Costs) -> tuple[float, ...]:
    """Return four times that each have to pass, one after the other.

    - The fill with forwards, and all the work of the last rank.
    - The fill, all forwards and I's of the last rank, the I's of the others down to the first stage, and a W there.
    - The way of one micro-batch through all stages and back, and the W of the first stage.
    - Its way to the last stage and from there to the first rank, and all I's and W's of that rank. With as many
      micro-batches as ranks and no latency it equals the first; with latency it is longer.
    """
    forward, inputs, weights = (costs.of(Action(0, op)) for op in (Op.F, Op.I, Op.W))
    messages, pairs = costs.messages(shape.pp_size), shape.num_microbatches * shape.num_chunks
    ring, way = sum(messages), sum(messages[:-1])
    others, there = shape.pp_size - 1, (shape.num_chunks - 1) * ring + way
    return (
        others * forward + way + pairs * (forward + inputs + weights),
        others * (forward + inputs) + 2 * way + pairs * (forward + inputs) + weights,
        shape.num_stages * (forward + inputs) + 2 * there + weights,
        shape.num_stages * forward + there + others * inputs + way + pairs * (inputs + weights),
    )


def table(results: list[Result]) -> str:
    """Return one block per shape and network, its arms in the order they were run."""
    lines: list[str] = []
    for (shape, network), arms in _rows(results):
        reference = next((each.median_s for each in arms if each.arm == REFERENCE), None)
        lines += [
            f"PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches, "
            f"network {network} (median of {len(arms[0].step_times_s)})",
            f"  {'arm':<24}{'step':>10}{'spread':>9}{'to bound':>10}{'to ' + REFERENCE:>16}{'predicted':>11}"
            + (f"{'exposed':>9}" if arms[0].exposed is not None else ""),
        ]
        lines += [
            f"  {each.arm:<24}{each.median_s:>8.3f} s{each.spread:>9.1%}{each.to_bound:>10.3f}"
            f"{'' if reference is None else f'{each.median_s / reference:.3f}':>16}"
            + _error(each)
            + ("" if each.exposed is None else f"{each.exposed:>9.2f}")
            for each in arms
        ]
        if any(each.is_split for each in arms):
            part = _split_bound(shape, arms[0].case.costs)
            lines.append(f"  bound of a split backward: {part:.3f} of that of a whole one")
    if any(each.exposed is not None for each in results):
        lines.append("exposed: what the data-parallel collectives add to the step, in those of one chunk "
                     "(a reduction and a gather)")  # fmt: skip
    return "\n".join(lines)


def _split_bound(shape: PipelineShape, costs: Costs) -> float:
    return lower_bound_s(shape, costs, is_split=True) / lower_bound_s(shape, costs)


def _error(each: Result) -> str:
    predicted_s = each.predicted_s
    return f"{'-':>11}" if predicted_s is None else f"{predicted_s / each.median_s - 1:>+11.1%}"


def markdown(results: list[Result]) -> str:
    """Return a row per case, a column per arm: step time over lower bound; in brackets the exposed collectives.

    The bound is that of whole backwards. With a split one its own bound has a column, as a part of the other.
    """
    arms = list(dict.fromkeys(each.arm for each in results))
    names = [*arms, *["split bound"] * any(each.is_split for each in results)]
    lines = ["| P x V, M | network | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (shape, network), found in _rows(results):
        by_arm = {
            each.arm: f"{each.to_bound:.3f}" + ("" if each.exposed is None else f" ({each.exposed:.2f})")
            for each in found
        }
        by_arm["split bound"] = f"{_split_bound(shape, found[0].case.costs):.3f}"
        cells = [f"{shape.pp_size} x {shape.num_chunks}, {shape.num_microbatches}", network]
        lines.append("| " + " | ".join([*cells, *(by_arm.get(name, "") for name in names)]) + " |")
    return "\n".join(lines) + "\n"


def _rows(results: list[Result]) -> Iterator[tuple[tuple[PipelineShape, str], list[Result]]]:
    for row in dict.fromkeys(each.row for each in results):
        yield row, [each for each in results if each.row == row]


def as_json(results: list[Result]) -> dict[str, Any]:
    """Return everything that was measured; times in seconds."""
    return {"format": "megatron_bfpp bench 1", "results": [_as_json(each) for each in results]}


def _as_json(each: Result) -> dict[str, Any]:
    case, shape, costs = each.case, each.case.shape, each.case.costs
    return {
        "arm": each.arm, "pp_size": shape.pp_size, "num_chunks": shape.num_chunks,
        "num_microbatches": shape.num_microbatches, "network": case.network, "connections": case.connections,
        "breadth_first_hop": case.hop, "breadth_first_weight_lag": case.weight_lag,
        "forward_s": costs.forward, "backward_s": costs.backward,
        "weights_s": costs.of(Action(0, Op.W)), "hop_s": costs.hop,
        "transfer_s": costs.transfer, "gather_s": costs.gather, "reduction_s": costs.reduction,
        "buckets": costs.buckets, "lower_bound_s": lower_bound_s(shape, costs, each.is_split),
        "predicted_s": each.predicted_s,
        "step_times_s": each.step_times_s, "free_step_times_s": each.free_step_times_s,
    }  # fmt: skip

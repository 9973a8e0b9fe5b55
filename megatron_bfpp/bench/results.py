"""What `bfpp bench` measured, as a table, as JSON and as a picture: ratios, which hold elsewhere, not times, which do not."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..schedule import Op, PipelineShape, Schedule, breadth_first, interleaved_1f1b, lower, one_f_one_b
from ..schedule.costs import MEGATRON, TORCH, Costs
from ..schedule.lower import aligned
from ..schedule.replay import replay

REFERENCE = "interleaved"  # Megatron's default; the arm that the others are compared with


@dataclass(frozen=True)
class Result:
    """The steps of one arm in one case. Times in seconds."""

    arm: str
    shape: PipelineShape
    network: str
    costs: Costs  # in seconds: what the stages and the network were told to take
    step_times_s: list[float]
    free_step_times_s: list[float] | None = None  # with data-parallel collectives that took no time; None without any
    plan: Schedule | None = None  # torch's own, of its arms: computation, sends and receives

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_times_s)

    @property
    def spread(self) -> float:
        """(longest - shortest) / median."""
        return (max(self.step_times_s) - min(self.step_times_s)) / self.median_s

    @property
    def to_bound(self) -> float:
        return self.median_s / lower_bound_s(self.shape, self.costs)

    @property
    def exposed_s(self) -> float | None:
        """What the data-parallel collectives add to the step; None without any."""
        return None if self.free_step_times_s is None else self.median_s - statistics.median(self.free_step_times_s)

    @property
    def exposed(self) -> float | None:
        """The same in collectives of one chunk: its reduction and its gather."""
        return None if self.exposed_s is None else self.exposed_s / (self.costs.reduction + self.costs.gather)

    @property
    def predicted_s(self) -> float:
        """What the simulator says of the plan of the arm, or of one in its order."""
        shape, costs = self.shape, self.costs
        if self.plan is not None:
            return replay(
                self.plan, shape, replace(costs, gather=0.0, reduction=costs.reduction + costs.gather), TORCH
            ).step_time
        if self.arm == "1f1b":
            return _one_f_one_b_s(shape, costs)
        if self.arm == "breadth-first-sharded":
            return replay(lower(breadth_first(shape), shape, resident_chunks=2), shape, costs).step_time
        plan = lower(_ORDERS[self.arm](shape), shape)
        if self.arm in ("breadth-first", "breadth-first-late"):
            return replay(plan, shape, costs).step_time
        # Megatron's loop reduces the first chunk as a whole.
        return replay(aligned(plan, shape), shape, replace(costs, buckets=1), MEGATRON).step_time


def _one_f_one_b_s(shape: PipelineShape, costs: Costs) -> float:
    """The chunks of a rank in a row are its one stage; Megatron's hooks gather it as it starts."""
    whole, chunks = PipelineShape(shape.pp_size, 1, shape.num_microbatches), shape.num_chunks
    forward, backward = _of_equal_stages(costs)
    costs = replace(
        costs, forward=forward * chunks, backward=backward * chunks, gather=costs.gather * chunks,
        reduction=costs.reduction * chunks, buckets=costs.buckets * chunks,
    )  # fmt: skip
    plan = [[each for each in actions if each.op is not Op.UNSHARD] for actions in lower(one_f_one_b(whole), whole)]
    return replay(plan, whole, costs, MEGATRON).step_time


_ORDERS: dict[str, Callable[[PipelineShape], Schedule]] = {
    "breadth-first": breadth_first,
    "breadth-first-late": lambda shape: breadth_first(shape, eager_backward=False),
    "breadth-first-megatron": breadth_first,
    "interleaved": interleaved_1f1b,
    "interleaved-grouped": lambda shape: interleaved_1f1b(shape, shape.num_microbatches),
}


def lower_bound_s(shape: PipelineShape, costs: Costs) -> float:
    """No schedule with looping placement is faster: the work of the last rank between the fill and the drain of the pipeline,
    or the way of one micro-batch through all stages and back, whichever is longer. Before that stands the gather of the first bucket of
    the first stage, after it the reduction of the last one. Equal stages.
    """
    both, messages = sum(_of_equal_stages(costs)), costs.messages(shape.pp_size)
    ring, way = sum(messages), sum(messages[:-1])
    work = shape.num_microbatches * shape.num_chunks * both + (shape.pp_size - 1) * both + 2 * way
    collectives = (costs.gather + costs.reduction) / costs.buckets
    return max(work, shape.num_stages * both + 2 * ((shape.num_chunks - 1) * ring + way)) + collectives


def _of_equal_stages(costs: Costs) -> tuple[float, float]:
    assert isinstance(costs.forward, int | float) and isinstance(costs.backward, int | float), (
        "the bench has equal stages"
    )
    return costs.forward, costs.backward


def table(results: list[Result]) -> str:
    """One block per shape and network, arms in the order they were run."""
    lines: list[str] = []
    for (shape, network), arms in _cases(results):
        reference = next((each.median_s for each in arms if each.arm == REFERENCE), None)
        lines.append(
            f"PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches, network {network} "
            f"(median of {len(arms[0].step_times_s)})"
        )
        lines.append(
            f"  {'arm':<24}{'step':>10}{'spread':>9}{'to bound':>10}{'to ' + REFERENCE:>16}{'predicted':>11}"
            + (f"{'exposed':>9}" if arms[0].exposed is not None else "")
        )
        for each in arms:
            against = "" if reference is None else f"{each.median_s / reference:.3f}"
            lines.append(
                f"  {each.arm:<24}{each.median_s:>8.3f} s{each.spread:>9.1%}{each.to_bound:>10.3f}{against:>16}"
                f"{each.predicted_s / each.median_s - 1:>+11.1%}"
                + ("" if each.exposed is None else f"{each.exposed:>9.2f}")
            )
    if any(each.exposed is not None for each in results):
        lines.append(
            "exposed: what the data-parallel collectives add to the step, in those of one chunk (a reduction and a gather)"
        )
    return "\n".join(lines)


def markdown(results: list[Result]) -> str:
    """A row per case, a column per arm: step time over the lower bound, and in brackets the exposed collectives where there are any."""
    arms = list(dict.fromkeys(each.arm for _, found in _cases(results) for each in found))
    lines = ["| P x V, M | network | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    for (shape, network), found in _cases(results):
        by_arm = {
            each.arm: f"{each.to_bound:.3f}" + ("" if each.exposed is None else f" ({each.exposed:.2f})")
            for each in found
        }
        cells = [
            f"{shape.pp_size} x {shape.num_chunks}, {shape.num_microbatches}",
            network,
            *(by_arm.get(arm, "") for arm in arms),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cases(results: list[Result]) -> Iterator[tuple[tuple[PipelineShape, str], list[Result]]]:
    grouped: dict[tuple[PipelineShape, str], list[Result]] = {}
    for each in results:
        grouped.setdefault((each.shape, each.network), []).append(each)
    yield from grouped.items()


def as_json(results: list[Result]) -> dict[str, Any]:
    """Everything that was measured; times in seconds."""
    return {
        "format": "megatron_bfpp bench 1",
        "results": [
            {
                "arm": each.arm,
                "pp_size": each.shape.pp_size,
                "num_chunks": each.shape.num_chunks,
                "num_microbatches": each.shape.num_microbatches,
                "network": each.network,
                "forward_s": each.costs.forward,
                "backward_s": each.costs.backward,
                "hop_s": each.costs.hop,
                "transfer_s": each.costs.transfer,
                "gather_s": each.costs.gather,
                "reduction_s": each.costs.reduction,
                "buckets": each.costs.buckets,
                "lower_bound_s": lower_bound_s(each.shape, each.costs),
                "predicted_s": each.predicted_s,
                "step_times_s": each.step_times_s,
                "free_step_times_s": each.free_step_times_s,
            }
            for each in results
        ],
    }

"""The tables of `bfpp plan`, and the same numbers as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..schedule.costs import EQUAL
from .search import Estimate, Found, Request
from .strategy import SCHEDULES, Strategy

__all__ = ["as_json", "batches", "best_of_schedules", "ranking", "rejections", "without_slower_twins"]

_HEADER = (
    "schedule                PP  TP   DP chunks  MBS    M group  sharding    recompute   step s  tok/s/GPU  TFLOP/s/GPU"
    "  GB/GPU  bubble  TP comm  exposed  connections  lag"
)


def ranking(estimates: Sequence[Estimate]) -> str:
    """Print a strategy a line. ~ marks times from the formula; all others are from the replayed plan."""
    return "\n".join([_HEADER, *map(_line, estimates)])


def _line(each: Estimate) -> str:
    s, step = each.strategy, each.step
    return (
        f"{s.schedule:<23}{s.pp:>3}{s.tp:>4}{s.dp:>5}{s.chunks:>7}{s.micro_batch:>5}{s.num_microbatches:>5}"
        f"{s.group:>6}  {s.sharding:<11} {s.recompute:<10}{'' if step.is_exact else '~':>2}{step.step:>7.3f}"
        f"{each.tokens_per_s_per_gpu:>11.0f}{each.tflops_per_gpu:>13.1f}{each.memory.total / 1e9:>8.1f}"
        f"{step.bubble_fraction:>8.1%}{each.tensor_parallel / step.step:>9.1%}"
        f"{step.exposed_communication / step.step:>9.1%}{each.connections:>13}"
        f"{max(s.chosen_lags()) if s.is_split else '-':>5}"
    )


def best_of_schedules(found: Found) -> list[Estimate]:
    """Return the fastest strategy of each schedule, in the order of SCHEDULES."""
    each_schedule = ((each for each in found.estimates if each.strategy.schedule == name) for name in SCHEDULES)
    return [best for best in (next(each, None) for each in each_schedule) if best is not None]


def without_slower_twins(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Leave out strategies with deferred weights' gradients that are no faster than the same without: they only need
    more memory, and would fill every second line.
    """
    plain = {each.strategy: each.step.step for each in estimates if not each.strategy.is_split}
    return [
        each for each in estimates
        if not each.strategy.is_split or each.step.step < plain.get(_twin(each.strategy), float("inf"))
    ]  # fmt: skip


def _twin(strategy: Strategy) -> Strategy:
    return replace(strategy, schedule="breadth-first", weight_lag=None, times=EQUAL)


def batches(found: dict[int, Found], request: Request) -> str:
    """Print global batch by schedule: TFLOP/s per GPU of the fastest strategy."""
    width = max(map(len, SCHEDULES)) + 2
    lines = ["TFLOP/s per GPU", f"{'batch':>7}{'per GPU':>9}" + "".join(f"{name:>{width}}" for name in SCHEDULES)]
    for batch, of_batch in found.items():
        best = {each.strategy.schedule: f"{each.tflops_per_gpu:.1f}" for each in best_of_schedules(of_batch)}
        cells = "".join(f"{best.get(name, '-'):>{width}}" for name in SCHEDULES)
        lines.append(f"{batch:>7}{batch / request.num_gpus:>9.3g}{cells}")
    return "\n".join(lines)


def rejections(found: Found, in_full: bool) -> str:
    """Print how many strategies were rejected; in_full: and for which reasons."""
    rejected = sum(found.rejected.values())
    text = f"{found.considered} strategies considered, {len(found.estimates)} fit, {rejected} rejected"
    if not in_full:
        return text + (" (--rejected says why)" if rejected else "")
    return "\n".join([text, *(f"{count:>8}  {reason}" for reason, count in found.rejected.most_common())])


def as_json(found: Found, request: Request, most: int) -> dict[str, Any]:
    """Return what was found for one global batch. Times in seconds, memory in bytes."""
    return {
        "global_batch": request.global_batch,
        "considered": found.considered,
        "rejected": dict(found.rejected.most_common()),
        "fit": len(found.estimates),
        "fastest": [_as_json(each) for each in found.estimates[:most]],
        "schedules": [_as_json(each) for each in best_of_schedules(found)],
    }


def _as_json(each: Estimate) -> dict[str, Any]:
    s, step = each.strategy, each.step
    memory = asdict(each.memory) | {"total": each.memory.total}
    del memory["step"]  # within the total
    return {
        "schedule": s.schedule, "pipeline": s.pp, "tensor": s.tp, "data": s.dp, "chunks": s.chunks,
        "micro_batch": s.micro_batch, "num_microbatches": s.num_microbatches, "group": s.group,
        "sharding": s.sharding, "recompute": s.recompute, "connections": each.connections,
        "weight_lag": list(s.chosen_lags()) if s.is_split else None,
        "step_s": step.step, "is_exact": step.is_exact,
        "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu, "tflops_per_gpu": each.tflops_per_gpu,
        "bubble_fraction": step.bubble_fraction, "tensor_parallel_s": each.tensor_parallel,
        "exposed_communication_s": step.exposed_communication, "memory": memory, "flags": s.flags(),
    }  # fmt: skip

"""The tables of `bfpp plan`, and the same numbers as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from ..schedule.costs import EQUAL
from ..schedule.model.layout import runs_of
from .search import Estimate, Found, Request
from .strategy import SCHEDULES, Strategy

__all__ = ["as_json", "batches", "best_of_schedules", "ranking", "rejections", "without_slower_twins"]

SHOWN_RUNS = 5  # of stages with the same number of layers


class _Column(NamedTuple):
    """A column: its title, its width, what stands in it, and the value with which all rows need no such column."""

    title: str
    width: int
    cell: Callable[[Estimate], object]
    usual: object = None


_COLUMNS = (
    _Column("schedule", -22, lambda each: each.strategy.schedule),
    _Column("PP", 4, lambda each: each.strategy.pp),
    _Column("TP", 4, lambda each: each.strategy.tp),
    _Column("CP", 4, lambda each: each.strategy.cp, 1),
    _Column("EP", 4, lambda each: each.strategy.ep, 1),
    _Column("ETP", 5, lambda each: each.strategy.split.etp if each.strategy.ep > 1 else 1, 1),
    _Column("DP", 5, lambda each: each.strategy.dp),
    _Column("chunks", 7, lambda each: each.strategy.chunks),
    _Column("MBS", 5, lambda each: each.strategy.micro_batch),
    _Column("M", 5, lambda each: each.strategy.num_microbatches),
    _Column("group", 6, lambda each: each.strategy.group),
    _Column("  sharding", -14, lambda each: f"  {each.strategy.sharding}"),
    _Column("recompute", -10, lambda each: each.strategy.recompute),
    _Column("CP by", 9, lambda each: each.strategy.cp_exchange if each.strategy.cp > 1 else "", ""),
    _Column("dispatcher", 12, lambda each: each.strategy.dispatcher if each.strategy.ep > 1 else "", ""),
    _Column("step s", 9, lambda each: f"{'' if each.step.is_exact else '~'}{each.step.step:>7.3f}"),
    _Column("tok/s/GPU", 11, lambda each: f"{each.tokens_per_s_per_gpu:.0f}"),
    _Column("TFLOP/s/GPU", 13, lambda each: f"{each.tflops_per_gpu:.1f}"),
    _Column("GB/GPU", 8, lambda each: f"{each.memory.total / 1e9:.1f}"),
    _Column("bubble", 8, lambda each: f"{each.step.bubble_fraction:.1%}"),
    _Column("TP comm", 9, lambda each: f"{each.tensor_parallel / each.step.step:.1%}"),
    _Column("exposed", 9, lambda each: f"{each.step.exposed_communication / each.step.step:.1%}"),
    _Column("connections", 13, lambda each: each.connections),
    _Column("lag", 5, lambda each: max(each.strategy.chosen_lags()) if each.strategy.is_split else "-"),
    _Column("  layers", -9, lambda each: f"  {_layers(each.strategy)}", "  "),
)


def ranking(estimates: Sequence[Estimate]) -> str:
    """Print a strategy a line. ~ marks times from the formula; all others are from the replayed plan."""
    rows: list[list[object]] = [[column.cell(each) for column in _COLUMNS] for each in estimates]
    shown = [
        place for place, column in enumerate(_COLUMNS)
        if column.usual is None or any(row[place] != column.usual for row in rows)
    ]  # fmt: skip
    rows.insert(0, [column.title for column in _COLUMNS])
    return "\n".join(_line([_COLUMNS[place].width for place in shown], row, shown) for row in rows)


def _line(widths: list[int], row: Sequence[object], shown: list[int]) -> str:
    """Write a row; a negative width stands for text, which begins at the left."""
    cells = zip(widths, (str(row[place]) for place in shown))
    return "".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for width, cell in cells).rstrip()


def _layers(s: Strategy) -> str:
    """Write how many decoder layers the stages have, in order, where not all have the same."""
    return runs_of(s.stage_layers, SHOWN_RUNS) if len(set(s.stage_layers)) > 1 else ""


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
    best = {
        batch: {each.strategy.schedule: f"{each.tflops_per_gpu:.1f}" for each in best_of_schedules(of_batch)}
        for batch, of_batch in found.items()
    }
    words = [word for word in SCHEDULES if any(word in of_batch for of_batch in best.values())]
    lines = ["TFLOP/s per GPU", f"{'batch':>7}{'per GPU':>9}" + "".join(f"{word:>{width}}" for word in words)]
    for batch, of_batch in best.items():
        cells = "".join(f"{of_batch.get(word, '-'):>{width}}" for word in words)
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
        "schedule": s.schedule, "pipeline": s.pp, "tensor": s.tp, "context": s.cp, "expert": s.split.ep,
        "expert_tensor": s.split.etp, "data": s.dp, "chunks": s.chunks,
        "micro_batch": s.micro_batch, "num_microbatches": s.num_microbatches, "group": s.group,
        "sharding": s.sharding, "recompute": s.recompute, "connections": each.connections,
        "stage_layers": list(s.stage_layers) or None,
        "weight_lag": list(s.chosen_lags()) if s.is_split else None,
        "step_s": step.step, "is_exact": step.is_exact,
        "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu, "tflops_per_gpu": each.tflops_per_gpu,
        "bubble_fraction": step.bubble_fraction, "tensor_parallel_s": each.tensor_parallel,
        "exposed_communication_s": step.exposed_communication, "memory": memory, "flags": s.flags(),
    }  # fmt: skip

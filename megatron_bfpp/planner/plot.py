"""The picture of `bfpp plan`: time against batch size per GPU, and the trade-off of cost and time. Needs matplotlib."""

from fractions import Fraction
from typing import Any

from ..console.files import write_figure
from ..schedule.names import SCHEDULES as NAMED
from .hardware import peak_of
from .noise_scale import CLUSTERS, trade_off
from .search import Found, Request
from .strategy import SCHEDULES
from .table import best_of_schedules

__all__ = ["plot"]

_DASHED = ("1f1b", "breadth-first-late")
_TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)  # GPU-days


def plot(found: dict[int, Found], request: Request, path: str, critical_batch: float | None, title: str) -> None:
    """Draw what was found for each global batch. The second panel needs a critical batch size, in sequences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5 if critical_batch else 6.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if critical_batch else 1, squeeze=False)[0]
    for name, of_batch in _gpu_seconds(found, request).items():
        style = {"marker": "o", "markersize": 3, "label": name, **_style(name)}
        panels[0].plot(list(of_batch), list(of_batch.values()), **style)
        if critical_batch:
            curve = trade_off(of_batch, request.gpt.seq_length, critical_batch, request.num_gpus)
            panels[1].plot([each.days for each in curve], [each.gpu_days for each in curve], **style)
    _describe_time(panels[0], request, [batch / request.num_gpus for batch in found])
    if critical_batch:
        _describe_cost(panels[1], request, critical_batch)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    write_figure(figure, path, "--plot")


def _style(name: str) -> dict[str, Any]:
    if name not in NAMED:  # no-pipeline
        return {"color": "#9aa0a6", "linestyle": ":"}
    return {"color": NAMED[name].color, "linestyle": "--" if name in _DASHED else "-"}


def _gpu_seconds(found: dict[int, Found], request: Request) -> dict[str, dict[float, float]]:
    """Return, for each schedule: batch per GPU -> GPU-seconds that a sequence takes with its fastest strategy."""
    seconds: dict[str, dict[float, float]] = {}
    for batch, of_batch in found.items():
        for best in best_of_schedules(of_batch):
            per_sequence = best.step.step * request.num_gpus / batch
            seconds.setdefault(best.strategy.schedule, {})[batch / request.num_gpus] = per_sequence
    return {name: seconds[name] for name in SCHEDULES if name in seconds}


def _describe_time(axes: Any, request: Request, batches: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(Fraction(each).limit_denominator(10**6)) for each in batches])
    axes.set_xlabel("batch size per GPU, in sequences")
    axes.set_ylabel("GPU-seconds per sequence")
    axes.set_ylim(bottom=0)
    ideal = request.gpt.flops(1) / request.gpu.peak_flops[peak_of(request.precision)]
    share = axes.secondary_yaxis("right", functions=(lambda value: value / ideal, lambda value: value * ideal))
    parts = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
    share.set_yticks([1 / part for part in parts], [f"{part:.0%}" for part in parts])
    share.set_ylabel("of the peak, in model FLOP/s")


def _describe_cost(axes: Any, request: Request, critical_batch: float) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_yticks([each for each in _TICKS if low <= each <= high])
    axes.set_xlabel("days per billion tokens")
    axes.set_ylabel("GPU-days per billion tokens")
    clusters = f"clusters of {request.num_gpus} to {CLUSTERS[-1]} GPUs, right to left"
    axes.set_title(f"{clusters}; critical batch {critical_batch:g} sequences", fontsize=8)

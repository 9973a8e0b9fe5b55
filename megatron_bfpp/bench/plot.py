"""The picture of a benchmark: each arm's step time over the lower bound of its case. Needs matplotlib."""

from __future__ import annotations

from typing import Any

from ..console.errors import UserError
from ..console.files import write_figure
from ..schedule import PipelineShape
from .results import REFERENCE, Result

CASES_IN_A_ROW = 6
TOP = 2.0  # of the axis; what is longer has its number written on its bar

_COLORS = {
    "1f1b": "#9aa0a6",
    "interleaved": "#5f6368",
    "interleaved-grouped": "#3c4043",
    "breadth-first": "#c46200",
    "breadth-first-late": "#e8a35c",
    "breadth-first-megatron": "#f3cfa6",
    "breadth-first-sharded": "#7a3d00",
    "torch-interleaved": "#9bbcf0",
    "torch-looped-bfs": "#1854a0",
}


def plot(results: list[Result], path: str) -> None:
    """Write the picture; its ending says in which format. A bar is a median, its line from shortest to longest step."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError(
            "--plot needs matplotlib.\n  pip install 'megatron-bfpp[report]', or leave --plot out."
        ) from None
    found = dict.fromkeys(each.arm for each in results)
    arms = [arm for arm in _COLORS if arm in found]
    cases = list(dict.fromkeys((each.shape, each.network) for each in results))
    rows = [cases[first : first + CASES_IN_A_ROW] for first in range(0, len(cases), CASES_IN_A_ROW)]
    size = max(7.5, 1.3 + 0.21 * len(arms) * len(rows[0])), 1.2 + 2.7 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), squeeze=False, sharey=True)[:, 0], rows, strict=True):
        for index, arm in enumerate(arms):
            bars = [(row.index(_case(each)), each) for each in results if each.arm == arm and _case(each) in row]
            _bars(axes, arm, bars, (index - (len(arms) - 1) / 2) * 0.86 / len(arms), 0.86 / len(arms))
        axes.axhline(1.0, color="#1c1c1c", linewidth=0.8)
        axes.set_ylim(0.9, min(TOP, max(each.to_bound for each in results) * 1.03))
        axes.set_xlim(-0.55, len(rows[0]) - 0.45)  # also in a last row that is shorter
        axes.set_ylabel("step time / lower bound")
        axes.set_xticks(range(len(row)), [_label(*case) for case in row], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    names = {arm: arm + (" (Megatron's default)" if arm == REFERENCE else "") for arm in arms}
    handles = [Patch(color=_COLORS[arm], label=name) for arm, name in names.items()]
    figure.legend(handles=handles, ncols=5, fontsize=8, frameon=False, loc="outside upper left")
    write_figure(figure, path, "--plot")


def _case(result: Result) -> tuple[PipelineShape, str]:
    return result.shape, result.network


def _bars(axes: Any, arm: str, bars: list[tuple[int, Result]], offset: float, width: float) -> None:
    heights = [each.to_bound for _, each in bars]
    bounds = [each.median_s / each.to_bound for _, each in bars]
    below = [h - min(each.step_times_s) / b for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
    above = [max(each.step_times_s) / b - h for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
    axes.bar([position + offset for position, _ in bars], heights, width, color=_COLORS[arm],
             yerr=[below, above], error_kw={"elinewidth": 0.8})  # fmt: skip
    for (position, _), height in zip(bars, heights, strict=True):
        if height > TOP:
            axes.text(
                position + offset,
                TOP - 0.02,
                f"{height:.1f}",
                rotation=90,
                ha="center",
                va="top",
                fontsize=7,
                color="white",
            )


def _label(shape: PipelineShape, network: str) -> str:
    return f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}\n" + network.replace(
        " + reduction", "\n+ reduction"
    )

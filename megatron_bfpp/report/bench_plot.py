"""The picture of a benchmark: each arm's step time over the lower bound of its case. Needs matplotlib."""

from __future__ import annotations

import os
from typing import Any

from ..errors import UserError
from ..schedule import PipelineShape
from .bench import REFERENCE, Result

CASES_IN_A_ROW = 6

_COLORS = {
    "1f1b": "#9aa0a6",
    "interleaved": "#5f6368",
    "interleaved-grouped": "#3c4043",
    "breadth-first": "#c46200",
    "breadth-first-late": "#e8a35c",
    "breadth-first-megatron": "#f3cfa6",
    "torch-interleaved": "#9bbcf0",
    "torch-looped-bfs": "#1854a0",
}


def plot(results: list[Result], path: str) -> None:
    """Write the picture; its ending says in which format. A bar is a median, its line from shortest to longest step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib.\n  pip install 'megatron-bfpp[report]', or leave --plot out.") from None
    arms = list(dict.fromkeys(each.arm for each in results))
    cases = list(dict.fromkeys((each.shape, each.network) for each in results))
    rows = [cases[first : first + CASES_IN_A_ROW] for first in range(0, len(cases), CASES_IN_A_ROW)]
    size = max(7.5, 1.3 + 0.21 * len(arms) * len(rows[0])), 1.2 + 2.7 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), squeeze=False, sharey=True)[:, 0], rows, strict=True):
        for index, arm in enumerate(arms):
            bars = [(row.index(_case(each)), each) for each in results if each.arm == arm and _case(each) in row]
            _bars(axes, arm, bars, (index - (len(arms) - 1) / 2) * 0.86 / len(arms), 0.86 / len(arms))
        axes.axhline(1.0, color="#1c1c1c", linewidth=0.8)
        axes.set_ylim(bottom=0.9)
        axes.set_xlim(-0.55, len(rows[0]) - 0.45)  # also in a last row that is shorter
        axes.set_ylabel("step time / lower bound")
        axes.set_xticks(range(len(row)), [_label(*case) for case in row], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, fontsize=8, frameon=False, loc="outside upper left")
    _write(figure, path)


def _case(result: Result) -> tuple[PipelineShape, str]:
    return result.shape, result.network


def _bars(axes: Any, arm: str, bars: list[tuple[int, Result]], offset: float, width: float) -> None:
    heights = [each.to_bound for _, each in bars]
    bounds = [each.median_s / each.to_bound for _, each in bars]
    below = [h - min(each.step_times_s) / b for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
    above = [max(each.step_times_s) / b - h for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
    label = arm + (" (Megatron's default)" if arm == REFERENCE else "")
    axes.bar([position + offset for position, _ in bars], heights, width, label=label, color=_COLORS.get(arm),
             yerr=[below, above], error_kw={"elinewidth": 0.8})  # fmt: skip


def _label(shape: PipelineShape, network: str) -> str:
    return f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}\n{network}"


def _write(figure: Any, path: str) -> None:
    """Under another name first: a picture is there whole or not at all."""
    stem, ending = os.path.splitext(path)
    temporary = f"{stem}.bfpp-{os.getpid()}{ending or '.png'}"
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)

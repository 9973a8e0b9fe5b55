"""The picture of a benchmark: each arm's step time over the lower bound of its case. Needs matplotlib."""

from typing import Any

from ..console.files import write_figure
from ..schedule import PipelineShape
from ..schedule.names import SCHEDULES
from .results import REFERENCE, Result

CASES_IN_A_ROW = 6
TOP = 2.0  # of the axis; a longer bar has its number written on it


def plot(results: list[Result], path: str) -> None:
    """Write the picture, in the format of its ending. A bar is a median, its line the shortest to the longest step."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = {each.arm for each in results}
    arms = [schedule for word, schedule in SCHEDULES.items() if word in found]
    cases = list(dict.fromkeys(each.row for each in results))
    rows = [cases[first : first + CASES_IN_A_ROW] for first in range(0, len(cases), CASES_IN_A_ROW)]
    size = max(7.5, 1.3 + 0.21 * len(arms) * len(rows[0])), 1.2 + 2.7 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), squeeze=False, sharey=True)[:, 0], rows, strict=True):
        for index, arm in enumerate(arms):
            bars = [(row.index(each.row), each) for each in results if each.arm == arm.word and each.row in row]
            width = 0.86 / len(arms)
            _bars(axes, arm.color, bars, (index - (len(arms) - 1) / 2) * width, width)
        axes.axhline(1.0, color="#1c1c1c", linewidth=0.8)
        heights = [each.to_bound for each in results]
        axes.set_ylim(min(0.9, 0.97 * min(heights)), min(TOP, 1.03 * max(heights)))
        axes.set_xlim(-0.55, len(rows[0]) - 0.45)  # also in a last row that is shorter
        axes.set_ylabel("step time / lower bound")
        axes.set_xticks(range(len(row)), [_label(*case) for case in row], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(color=arm.color, label=arm.word + (" (Megatron's default)" if arm.word == REFERENCE else ""))
        for arm in arms
    ]
    figure.legend(handles=handles, ncols=5, fontsize=8, frameon=False, loc="outside upper left")
    write_figure(figure, path, "--plot")


def _bars(axes: Any, color: str, bars: list[tuple[int, Result]], offset: float, width: float) -> None:
    positions, heights = [position + offset for position, _ in bars], [each.to_bound for _, each in bars]
    spans = [(min(each.step_times_s), each.median_s, max(each.step_times_s)) for _, each in bars]
    below = [height * (1 - least / median) for height, (least, median, _) in zip(heights, spans, strict=True)]
    above = [height * (most / median - 1) for height, (_, median, most) in zip(heights, spans, strict=True)]
    axes.bar(positions, heights, width, color=color, yerr=[below, above], error_kw={"elinewidth": 0.8})
    for position, height in zip(positions, heights, strict=True):
        if height > TOP:
            axes.text(
                position, TOP - 0.02, f"{height:.1f}", rotation=90, ha="center", va="top", fontsize=7, color="white"
            )


def _label(shape: PipelineShape, network: str) -> str:
    network = network.replace(" + reduction", "\n+ reduction")
    return f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}\n{network}"

"""The picture of a benchmark: each arm's step time over the lower bound of its case. Needs matplotlib."""

from __future__ import annotations

import os

from ..errors import UserError
from .bench import REFERENCE, Result

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
    figure = Figure(figsize=(max(7.5, 1.3 + 0.26 * len(arms) * len(cases)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.86 / len(arms)
    for index, arm in enumerate(arms):
        bars = [(cases.index((each.shape, each.network)), each) for each in results if each.arm == arm]
        middle = [position + (index - (len(arms) - 1) / 2) * width for position, _ in bars]
        heights = [each.to_bound for _, each in bars]
        bounds = [each.median_s / each.to_bound for _, each in bars]
        below = [h - min(each.step_times_s) / b for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
        above = [max(each.step_times_s) / b - h for h, b, (_, each) in zip(heights, bounds, bars, strict=True)]
        axes.bar(middle, heights, width, label=arm + (" (Megatron's default)" if arm == REFERENCE else ""),
                 color=_COLORS.get(arm), yerr=[below, above], error_kw={"elinewidth": 0.8})  # fmt: skip
    axes.axhline(1.0, color="#1c1c1c", linewidth=0.8)
    axes.set_ylim(bottom=0.9)
    axes.set_ylabel("step time / lower bound")
    axes.set_xticks(range(len(cases)), [_label(*case) for case in cases], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=4, fontsize=8, frameon=False, loc="outside upper left")
    _write(figure, path)


def _label(shape: object, network: str) -> str:
    return f"PP {shape.pp_size} x {shape.num_chunks}\nM {shape.num_microbatches}\n{network}"  # type: ignore[attr-defined]


def _write(figure: object, path: str) -> None:
    """Under another name first: a picture is there whole or not at all."""
    stem, ending = os.path.splitext(path)
    temporary = f"{stem}.bfpp-{os.getpid()}{ending or '.png'}"
    try:
        figure.savefig(temporary, dpi=150)  # type: ignore[attr-defined]
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)

"""The timelines of `picture.svg` as a PNG. Needs matplotlib."""

from __future__ import annotations

from ..console.errors import UserError
from ..console.files import write_figure
from ..schedule import Op, Timeline
from .svg import shade


def png(timelines: list[tuple[str, Timeline]], path: str) -> None:
    """Write the picture of named timelines, one below the other on one time axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib.\n  pip install 'megatron-bfpp[report]', or write --svg.") from None
    most, heights = (
        max(each.shape.num_chunks for _, each in timelines),
        [0.9 + 0.28 * each.shape.pp_size for _, each in timelines],
    )
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    plots = figure.subplots(len(timelines), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, timeline) in zip(plots, timelines, strict=True):
        chunks, ranks = timeline.shape.num_chunks, timeline.shape.pp_size
        for rank, spans in enumerate(timeline.spans):
            bars = [(span.start, span.end - span.start) for span in spans]
            colors = [shade(span.action.op, timeline.shape.chunk_of(span.action.stage), chunks)[0] for span in spans]
            axes.broken_barh(bars, (rank - 0.42, 0.84), facecolors=colors, edgecolor="white", linewidth=0.4)
        axes.set_yticks(range(ranks), [f"pp_rank {rank}" for rank in range(ranks)], fontsize=8)
        axes.invert_yaxis()
        axes.set_facecolor("#f0f0f0")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"{name}: step {timeline.step_time:g} forwards, bubble {timeline.bubble_fraction:.1%}",
            loc="left",
            fontsize=10,
        )
    for op, label in ((Op.F, "forward"), (Op.B, "backward")):
        axes.barh(
            [0],
            [0],
            color=shade(op, most - 1, most)[0],
            label=label + (", lighter: an earlier chunk" if most > 1 else ""),
        )
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12))
    axes.set_xlim(0, max(each.step_time for _, each in timelines))
    axes.set_xlabel("time in forwards of a chunk", loc="right", fontsize=8)
    write_figure(figure, path, "--png")

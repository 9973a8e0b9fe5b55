"""A schedule as text: one row per rank, one column per unit of time. Standard library and schedule only."""

from __future__ import annotations

from ..schedule import Op, Timeline


def grid(timeline: Timeline, unit: float = 1.0, width: int | None = None) -> str:
    """`f10` = forward, chunk 1, microbatch 0; `b10` its backward; `.` idle. Rows longer than `width` end in `...`.

    unit: the time one column stands for, in the unit of the timeline (a forward).
    """
    shape = timeline.shape
    size = len(str(shape.num_chunks - 1)) + len(str(shape.num_microbatches - 1)) + (shape.num_microbatches > 10) + 1
    columns = round(timeline.step_time / unit)
    rows = []
    for pp_rank, spans in enumerate(timeline.spans):
        cells = ["."] * columns
        for span in spans:
            letter = "f" if span.action.op is Op.F else "b"
            between = "." if shape.num_microbatches > 10 else ""
            name = f"{letter}{shape.chunk_of(span.action.stage)}{between}{span.action.microbatch}"
            first = round(span.start / unit)
            cells[first : max(first + 1, round(span.end / unit))] = [name] * max(1, round((span.end - span.start) / unit))
        row = f"pp_rank {pp_rank:<{len(str(shape.pp_size - 1))}} |" + " ".join(cell.ljust(size) for cell in cells)
        rows.append(row if width is None or len(row) <= width else row[: max(20, width - 4)] + " ...")
    return "\n".join(rows)


def summary(timeline: Timeline) -> str:
    """Step time, bubble and memory in one line."""
    peaks = timeline.peak_live_activations()
    return (
        f"step time {timeline.step_time:g} forward units, bubble {timeline.bubble_fraction:.1%}, "
        f"peak live activations {max(peaks)} (pp_rank {peaks.index(max(peaks))}) to {min(peaks)}"
    )

"""A schedule as text: one row per rank, one column per unit of time. Standard library and schedule only."""

from ..schedule import Span, Timeline


def column_time(timeline: Timeline) -> float:
    """Return the time of a column: a forward, or the shortest action where a backward is shorter than that."""
    return min(1.0, *(span.end - span.start for spans in timeline.spans for span in spans))


def grid(timeline: Timeline, width: int | None = None) -> str:
    """Return a row per rank: `f10` is the forward of chunk 1 and microbatch 0, `b10` its backward, `.` idle.

    Of a split backward `i10` is the input's gradient, `w10` the weights'.

    A column shows what runs in its middle. No action is shorter than a column, so none is lost. Rows that are longer
    than `width` end in `...`.
    """
    shape, unit = timeline.shape, column_time(timeline)
    size = len(str(shape.num_chunks - 1)) + len(str(shape.num_microbatches - 1)) + (shape.num_microbatches > 10) + 1
    columns = round(timeline.step_time / unit)
    label = f"pp_rank {{:<{len(str(shape.pp_size - 1))}}} |"
    # A column and its blank take size + 1 characters. Only columns in sight are made.
    room = columns if width is None else max(1, (width - len(label.format(0)) - len(" ...")) // (size + 1))
    is_cut = width is not None and len(label.format(0)) + columns * (size + 1) - 1 > width
    rows = []
    for pp_rank, spans in enumerate(timeline.spans):
        cells = ["."] * (min(room, columns) if is_cut else columns)
        for span in spans:
            # Column c shows the time (c + 1/2) unit; the small number absorbs rounding of the simulated times.
            first, end = (max(0, round(time / unit - 1e-6)) for time in (span.start, span.end))
            for column in range(first, min(end, len(cells))):
                cells[column] = _name(span, timeline)
        rows.append(label.format(pp_rank) + " ".join(cell.ljust(size) for cell in cells) + (" ..." if is_cut else ""))
    return "\n".join(row.rstrip() for row in rows)


def _name(span: Span, timeline: Timeline) -> str:
    shape, (stage, op, microbatch) = timeline.shape, span.action
    between = "." if shape.num_microbatches > 10 else ""  # f1.10 is not f11.0
    return f"{op.lower()}{shape.chunk_of(stage)}{between}{microbatch}"


def summary(timeline: Timeline) -> str:
    """Return step time, bubble and memory in one line."""
    unit = column_time(timeline)
    owed = timeline.peak_owed_weight_gradients()
    return (
        f"step time {timeline.step_time:g} forward units, bubble {timeline.bubble_fraction:.1%}, "
        f"peak live activations {_most(timeline.peak_live_activations())}"
        + (f", peak owed weights' gradients {_most(owed)}" if any(owed) else "")
        + (f"; one column is {unit:g} forward units" if unit < 1 - 1e-9 else "")
    )


def _most(peaks: list[int]) -> str:
    return f"{max(peaks)} (pp_rank {peaks.index(max(peaks))}) to {min(peaks)}"

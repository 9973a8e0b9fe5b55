"""Timelines as one SVG on one time axis: forwards blue, backwards orange, darker with each chunk. Standard library."""

from __future__ import annotations

import re
from html import escape

from ..schedule import Op, Span, Timeline
from .measured import Measured, Wait

_WIDTH = 1280  # pixels of a picture whose boxes are wide enough
_ROW, _GAP, _LEFT, _TOP = 22, 4, 84, 50  # pixels: a rank's row, between rows, the labels, the titles
_LIGHT = {Op.F: (191, 217, 245), Op.B: (255, 217, 168)}  # first chunk
_DARK = {Op.F: (24, 84, 160), Op.B: (196, 98, 0)}  # last chunk
_WAITS = {"p2p": "#d62768", "dp": "#2a8a3e"}  # what a measured step stood still for
_FONT = "font-family='system-ui, sans-serif'"


def svg(
    timelines: list[tuple[str, Timeline]], width: int = _WIDTH, unit: str = "forward units", forward: float = 1.0
) -> str:
    """The picture of named timelines, one below the other. Text is inside a box where it fits.

    width: pixels of the whole picture; wide schedules get at least 3 pixels per forward.
    unit, forward: of all times, and how long a forward is in it.
    """
    end = max(timeline.step_time for _, timeline in timelines)
    scale = max((width - _LEFT - 20) / end, 3.0 / forward)
    parts: list[str] = []
    y = 0
    for name, timeline in timelines:
        parts += _one(name, timeline, y, scale, end, unit)
        y += _TOP + timeline.shape.pp_size * (_ROW + _GAP) + 34
    total_width, height = round(_LEFT + end * scale + 20), y + 26
    has_waits = any(isinstance(timeline, Measured) for _, timeline in timelines)
    legend = _legend(y + 6, max(each.shape.num_chunks for _, each in timelines), unit, has_waits)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{total_width}' height='{height}' "
        f"viewBox='0 0 {total_width} {height}'>\n<rect width='100%' height='100%' fill='#ffffff'/>\n"
        + "\n".join(parts + legend)
        + "\n</svg>\n"
    )


def least_width(picture: str) -> int:
    """Pixels to which a page may shrink a picture of `svg` before it scrolls it. A wide one keeps its boxes' width."""
    found = re.search(r"<svg [^>]*?\bwidth='(\d{1,6})'", picture)
    width = int(found[1]) if found else 0
    return width if width > _WIDTH else 704


def _one(name: str, timeline: Timeline, y: int, scale: float, end: float, unit: str) -> list[str]:
    shape = timeline.shape
    title = (
        f"{name}: PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches. "
        f"Step {timeline.step_time:.6g} {unit}, bubble {timeline.bubble_fraction:.1%}"
    )
    parts = [
        f"<text x='{_LEFT}' y='{y + 28}' {_FONT} font-size='15' font-weight='600' fill='#1c1c1c'>{escape(title)}</text>"
    ]
    for pp_rank, spans in enumerate(timeline.spans):
        top = y + _TOP + pp_rank * (_ROW + _GAP)
        parts.append(
            f"<text x='{_LEFT - 8}' y='{top + 15}' {_FONT} font-size='12' text-anchor='end' fill='#1c1c1c'>"
            f"pp_rank {pp_rank}</text>"
            f"<rect x='{_LEFT}' y='{top}' width='{timeline.step_time * scale:.1f}' height='{_ROW}' fill='#f0f0f0'/>"
        )
        parts += [_box(span, timeline, top, scale) for span in spans]
        if isinstance(timeline, Measured):
            visible = [wait for wait in timeline.waits[pp_rank] if (wait.end - wait.start) * scale >= 0.3]
            parts += [_wait(wait, top, scale) for wait in visible]
    return parts + _axis(y + _TOP + shape.pp_size * (_ROW + _GAP), scale, end)


def _box(span: Span, timeline: Timeline, top: int, scale: float) -> str:
    stage, op, microbatch = span.action
    chunk, chunks = timeline.shape.chunk_of(stage), timeline.shape.num_chunks
    color, is_dark = shade(op, chunk, chunks)
    x, wide = _LEFT + span.start * scale, (span.end - span.start) * scale
    box = (
        f"<rect class='{op.value}' x='{x:.1f}' y='{top}' width='{max(wide - 0.8, 0.8):.1f}' height='{_ROW}' fill='{color}'>"
        f"<title>{span.action} (chunk {chunk}): {span.start:.6g} to {span.end:.6g}</title></rect>"
    )
    if wide >= 7 * len(str(microbatch)) + 2:
        box += (
            f"<text x='{x + wide / 2:.1f}' y='{top + 15}' {_FONT} font-size='11' text-anchor='middle' "
            f"fill='{'#ffffff' if is_dark else '#1c1c1c'}'>{microbatch}</text>"
        )
    return box


def _wait(wait: Wait, top: int, scale: float) -> str:
    """A bar along the foot of the row, which leaves the action that waits to be seen."""
    x, wide = _LEFT + wait.start * scale, (wait.end - wait.start) * scale
    return (
        f"<rect class='wait-{wait.kind}' x='{x:.1f}' y='{top + _ROW - 5}' width='{wide:.1f}' height='5' "
        f"fill='{_WAITS[wait.kind]}'><title>waits for {wait.name}: {wait.end - wait.start:.6g}</title></rect>"
    )


def shade(op: Op, chunk: int, chunks: int) -> tuple[str, bool]:
    """Color of a chunk, and whether it wants white text on it."""
    part = chunk / max(1, chunks - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_LIGHT[op], _DARK[op], strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", 0.3 * red + 0.6 * green + 0.1 * blue < 140


def _axis(y: int, scale: float, end: float) -> list[str]:
    """Ticks at least 60 pixels apart, at round numbers of forward units."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if s * scale >= 60)
    parts = []
    for tick in range(0, int(end) + 1, step):
        x = _LEFT + tick * scale
        parts.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{y}' y2='{y + 4}' stroke='#666666'/>"
            f"<text x='{x:.1f}' y='{y + 16}' {_FONT} font-size='11' text-anchor='middle' fill='#555555'>{tick}</text>"
        )
    return parts


def _legend(y: int, chunks: int, unit: str, has_waits: bool) -> list[str]:
    parts, x = [], _LEFT
    for op, name in ((Op.F, "forward"), (Op.B, "backward")):
        for chunk in range(chunks):
            parts.append(f"<rect x='{x}' y='{y}' width='14' height='12' fill='{shade(op, chunk, chunks)[0]}'/>")
            x += 15
        label = f"{name}, first chunk to last" if chunks > 1 else name
        parts.append(f"<text x='{x + 5}' y='{y + 10}' {_FONT} font-size='12' fill='#1c1c1c'>{label}</text>")
        x += 190
    if has_waits:
        for kind, name in (("p2p", "waits for a message"), ("dp", "waits for a gather or reduction")):
            parts.append(f"<rect x='{x}' y='{y + 4}' width='14' height='5' fill='{_WAITS[kind]}'/>")
            parts.append(f"<text x='{x + 20}' y='{y + 10}' {_FONT} font-size='12' fill='#1c1c1c'>{name}</text>")
            x += 150 if kind == "p2p" else 210
    note = f"number: microbatch; grey: idle; time in {unit}"
    return [*parts, f"<text x='{x}' y='{y + 10}' {_FONT} font-size='12' fill='#555555'>{note}</text>"]

"""A schedule as one HTML page that needs nothing else: the picture, and what it shows in numbers. Standard library."""

from __future__ import annotations

from html import escape

from ..schedule import Timeline
from .canvas import least_width
from .picture import picture

_STYLE = """
body { font: 16px system-ui, sans-serif; margin: 1.5rem; color: #1c1c1c; background: #ffffff; }
h1 { font-size: 1.5rem; }
.picture { overflow-x: auto; }
.picture svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; margin-top: 1rem; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #d0d0d0; }
th:first-child, td:first-child { text-align: left; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #0d1117; } }
@media (max-width: 40rem) { body { margin: 1rem 0.8rem; } table { width: 100%; font-size: 0.85rem; }
  th, td { padding: 0.3rem 0.25rem; } }
"""


def page(timelines: list[tuple[str, Timeline]], note: str = "") -> str:
    """Return the page of named timelines on one time axis. A box shows its action where the pointer rests."""
    shape = max(
        (each.shape for _, each in timelines), key=lambda shape: shape.num_chunks
    )  # not that of 1F1B, which has none
    title = f"PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{each.step_time:g}</td><td>{each.bubble_fraction:.2%}</td>"
        f"<td>{', '.join(map(str, each.peak_live_activations()))}</td></tr>"
        for name, each in timelines
    )
    drawn = picture(timelines, note=note).svg()
    inline = drawn.replace("<svg ", f"<svg style='min-width: {least_width(drawn)}px' ", 1)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f"<div class='picture'>{inline}</div>\n"
        "<table><tr><th>order</th><th>step, in forwards</th><th>bubble</th><th>peak live activations by rank</th></tr>"
        f"{rows}</table>\n</body></html>\n"
    )

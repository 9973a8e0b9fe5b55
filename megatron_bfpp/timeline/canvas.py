"""A picture made of boxes, lines and words, written as SVG or as PNG. Standard library; the PNG needs matplotlib.

The SVG is written by hand: four shapes need no library, and equal pictures get equal bytes. It names no font of its
own and brings its colours for light and dark screens in a style sheet, which a browser also obeys inside an <img>.
"""

import math
import re
import textwrap
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

from ..console.files import write_figure

WIDTH = 900  # pixels of a picture whose content does not need more
_PHONE = 704  # pixels to which a page may shrink such a picture before it scrolls it
# The colours that depend on the screen: kind -> on a light one, on a dark one.
_COLORS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "idle": ("#eef0f2", "#21262d"),
    "message": ("#c2255c", "#f06595"),
    "wait-p2p": ("#d6336c", "#f06595"),
    "wait-dp": ("#7048e8", "#9775fa"),
    "warning": ("#b3261e", "#ff8a80"),
}
_LETTER = 0.54  # of the font's size: the mean width of a letter of system-ui


class Box(NamedTuple):
    """A rectangle. color: of a box that is the same on light and dark screens; else its kind gives the colour."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    color: str = ""
    about: str = ""  # shown where the pointer rests


class Lines(NamedTuple):
    """Straight lines from (x1, y1) to (x2, y2), in one style."""

    points: list[tuple[float, float, float, float]]
    kind: str
    width: float = 1.0
    dashes: str = ""


class Words(NamedTuple):
    """A line of text; y is its baseline."""

    x: float
    y: float
    text: str
    size: float = 12
    kind: str = "ink"
    color: str = ""
    anchor: str = "start"  # or middle, end
    is_bold: bool = False


def text_width(text: str, size: float) -> float:
    """Estimate pixels; no font is asked."""
    return len(text) * size * _LETTER


@dataclass
class Drawing:
    """Shapes in the order in which they are painted. title: for readers who do not see the picture."""

    title: str
    width: float = WIDTH
    height: float = 0.0
    shapes: list[Box | Lines | Words] = field(default_factory=list)

    def legend(self, entries: list[tuple[str, list[Box | Lines]]], left: float) -> None:
        """Add swatches with their names at the foot, in as many lines as they need. Swatches count from (0, 0)."""
        x = left
        for name, swatches in entries:
            wide = sum(each.width + 1 if isinstance(each, Box) else 16 for each in swatches)
            gap = 6 if swatches else 0
            whole = wide + gap + text_width(name, 12) + 16
            if x > left and x + whole > WIDTH:
                x, self.height = left, self.height + 19
            for each in swatches:
                if isinstance(each, Box):
                    self.shapes.append(each._replace(x=x + each.x, y=self.height + each.y))
                else:
                    ends = [(x1 + x, y1 + self.height, x2 + x, y2 + self.height) for x1, y1, x2, y2 in each.points]
                    self.shapes.append(each._replace(points=ends))
            self.shapes.append(Words(x + wide + gap, self.height + 10, name))
            x += whole
        self.height += 20

    def note(self, text: str, left: float) -> None:
        """Add a paragraph at the foot."""
        for line in textwrap.wrap(text, int((WIDTH - left) / text_width("m", 12))):
            self.shapes.append(Words(left, self.height + 12, line, kind="soft"))
            self.height += 18
        self.height += 6

    def svg(self) -> str:
        size = f"width='{self.width:.0f}' height='{self.height:.0f}' viewBox='0 0 {self.width:.0f} {self.height:.0f}'"
        shapes = "\n".join(map(_svg, self.shapes))
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' class='bfpp' role='img' {size}>\n"
            f"<title>{escape(self.title, quote=False)}</title>\n<style>\n{_STYLE}</style>\n"
            f"<rect class='paper' width='100%' height='100%'/>\n{shapes}\n</svg>\n"
        )

    def png(self, path: str, flag: str) -> None:
        """Write the picture in the colours of a light screen. The caller has checked that matplotlib is there."""
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure: Any = Figure(figsize=(self.width / 72, self.height / 72), facecolor=_COLORS["paper"][0])
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        axes.axis("off")
        for order, shape in enumerate(self.shapes):
            style: dict[str, Any] = {"zorder": order}
            if isinstance(shape, Lines):
                ends = [((x1, y1), (x2, y2)) for x1, y1, x2, y2 in shape.points]
                style |= {"linewidths": shape.width, "linestyles": "--" if shape.dashes else "-"}
                axes.add_collection(LineCollection(ends, colors=_COLORS[shape.kind][0], **style))
                continue
            color = shape.color or _COLORS[shape.kind][0]
            if isinstance(shape, Box):
                axes.add_patch(Rectangle(shape[:2], *shape[2:4], facecolor=color, linewidth=0, **style))
            else:
                style |= {"ha": _ALIGNED[shape.anchor], "weight": "bold" if shape.is_bold else "normal"}
                axes.text(*shape[:2], shape.text.replace("$", r"\$"), fontsize=shape.size * 0.9, color=color, **style)
        write_figure(figure, path, flag)


_ALIGNED = {"start": "left", "middle": "center", "end": "right"}


def _rules(screen: int) -> str:
    return "".join(
        f".bfpp .{kind} {{ fill: {pair[screen]}; stroke: {pair[screen]}; }}\n" for kind, pair in _COLORS.items()
    )


_STYLE = (
    ".bfpp text { font-family: system-ui, sans-serif; } .bfpp :not(path) { stroke: none !important; }\n"
    f"{_rules(0)}@media (prefers-color-scheme: dark) {{\n{_rules(1)}}}\n"
)


def _svg(shape: Box | Lines | Words) -> str:
    if isinstance(shape, Lines):
        path = "".join(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" for x1, y1, x2, y2 in shape.points)
        dashes = f" stroke-dasharray='{shape.dashes}'" if shape.dashes else ""
        return f"<path class='{shape.kind}' stroke-width='{shape.width:g}'{dashes} d='{path}'/>"
    color = f" fill='{shape.color}'" if shape.color else ""
    if isinstance(shape, Words):
        bold = " font-weight='600'" if shape.is_bold else ""
        anchor = f" text-anchor='{shape.anchor}'" if shape.anchor != "start" else ""
        kind = "" if color else f" class='{shape.kind}'"
        place = f"x='{shape.x:.1f}' y='{shape.y:.1f}' font-size='{shape.size:g}'"
        return f"<text{kind} {place}{anchor}{bold}{color}>{escape(shape.text, quote=False)}</text>"
    place = f"x='{shape.x:.1f}' y='{shape.y:.1f}' width='{shape.width:.1f}' height='{shape.height:.1f}'"
    about = f"<title>{escape(shape.about, quote=False)}</title></rect>" if shape.about else "</rect>"
    return f"<rect class='{shape.kind}' {place}{color}>{about}"


def least_width(svg: str) -> int:
    """Pixels to which a page may shrink an SVG of ours before it scrolls it. A wide one keeps its boxes' width."""
    found = re.search(r"<svg [^>]*?\bwidth='(\d{1,6})'", svg)
    width = int(found[1]) if found else 0
    return width if width > WIDTH else _PHONE


def round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20 ... (also 0.1, 0.2, 0.5 ...) that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))

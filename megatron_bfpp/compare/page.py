"""An A/B as one HTML page that needs nothing else: no script, no network. The table becomes cards on a phone."""

from __future__ import annotations

import base64
from html import escape

from ..timeline.canvas import least_width
from .numbers import Arm, Comparison
from .runs import Run, number
from .text import COLUMNS, cells, sections

_LARGEST_PICTURE = 4_000_000  # bytes of a timeline.svg that is still put into the page
_CURVE_POINTS = 400  # of a loss curve; a pixel has no room for more
_COLORS = 6

# Whatever a run's files say, a page under this policy loads and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5b636e; --line: #d9dde3; --back: #ffffff; --card: #f5f7f9;
  --bad: #b3261e;
  --c0: #1d63b8; --c1: #c25e00; --c2: #2a7d46; --c3: #8a3fb0; --c4: #a8326e; --c5: #5d6b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb6; --line: #3a414a; --back: #15181c;
  --card: #1e2328; --bad: #ff8a80;
  --c0: #6db1ff; --c1: #ffab5e; --c2: #6fd08c; --c3: #d09bf0; --c4: #f58fc0; --c5: #c6d45a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 82rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); font-size: .9rem; } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; } td:first-child {
  font-weight: 600; }
ul { margin: 0; padding-left: 1.2rem; } li { margin: .15rem 0; }
svg { display: block; width: 100%; overflow: visible; } svg text { fill: var(--soft); font-size: 12px; }
.strip { display: grid; grid-template-columns: minmax(6rem, 12rem) 1fr; column-gap: 1.2rem; align-items: center;
  padding-right: 1.2rem; }
.track { stroke: var(--line); } .p90 { stroke: var(--soft); stroke-width: 2; } .run { fill: var(--c0); fill-opacity:
  .75; }
.p50 { stroke: var(--ink); stroke-width: 3; } .curve { fill: none; stroke-width: 2; } .key { display: inline-block;
  margin-right: 1.2rem; }
.key::before { content: ""; display: inline-block; width: 1rem; height: .2rem; margin-right: .4rem; vertical-align:
  middle; background: var(--key); }
figure { margin: .5rem 0; overflow-x: auto; background: #fff; border: 1px solid var(--line); }
img { display: block; width: 100%; height: auto; } figcaption { color:
  var(--soft); font-size: .9rem; }
@media (max-width: 60rem) {
  thead { display: none; } table, tbody, tr, td { display: block; width: 100%; }
  tr { background: var(--card); border-radius: .5rem; padding: .5rem .3rem; margin: .7rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .15rem .6rem; text-align: right;
  }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; font-weight: 400; }
  td:first-child::before { content: none; }
  .strip { grid-template-columns: 1fr; } .strip > b { margin-top: .5rem; } }
"""


def page(comparison: Comparison, runs: list[Run]) -> str:
    """The page of a comparison, with the timelines and loss curves of its runs."""
    first = comparison.arms[0].name
    verdict = (
        "Every run finished, with the losses of the first."
        if comparison.is_good
        else "NOT every run finished with the losses of the first."
    )
    body = [
        "<h1>A/B of pipeline schedules</h1>",
        f"<p{'' if comparison.is_good else ' class=bad'}>{verdict}</p>",
        f"<p class=soft>{len(runs)} runs in {len(comparison.arms)} arms; the reference is {escape(first)}.</p>",
        _table(comparison),
        _step_times(comparison.arms),
        _curves(runs),
    ]
    for title, sentences in sections(comparison).items():
        items = "".join(f"<li>{escape(each)}</li>" for each in sentences)
        body.append(f"<h2>{escape(title)}</h2><ul>{items}</ul>")
        if title == "Losses":
            body.append(_timelines(runs))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>A/B: {escape(', '.join(arm.name for arm in comparison.arms))}</title>"
        f"<style>{_STYLE}</style></head>\n<body>" + "\n".join(part for part in body if part) + "</body></html>\n"
    )


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = []
    for arm in comparison.arms:
        row = zip(COLUMNS, cells(arm), strict=True)
        rows.append(
            "<tr>" + "".join(f'<td data-label="{escape(name)}">{escape(cell)}</td>' for name, cell in row) + "</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _step_times(arms: list[Arm]) -> str:
    """A strip per arm: a dot for each run's median, a bar for the arm's p50, a thin line to its p90."""
    timed = [arm for arm in arms if arm.step_s_p50 is not None and arm.step_s_p90 is not None]
    values = [
        value
        for arm in timed
        for value in (*(run.median_s for run in arm.times), arm.step_s_p50, arm.step_s_p90)
        if value is not None
    ]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (high - low) or 1.0
    rows = []
    for arm in timed:
        p50, p90 = ((value - low) / scale for value in (arm.step_s_p50 or low, arm.step_s_p90 or low))
        dots = "".join(
            f"<circle class=run cx='{(run.median_s - low) / scale:.2%}' cy=14 r=5>"
            f"<title>{escape(run.run)}: {run.median_s:.4g} s</title></circle>"
            for run in arm.times
        )
        rows.append(
            f"<b>{escape(arm.name)}</b><svg height=28 role=img aria-label='step times of {escape(arm.name)}'>"
            f"<line class=track x1=0 x2='100%' y1=14 y2=14 />"
            f"<line class=p90 x1='{p50:.2%}' x2='{p90:.2%}' y1=14 y2=14 />"
            f"{dots}<line class=p50 x1='{p50:.2%}' x2='{p50:.2%}' y1=4 y2=24 /></svg>"
        )
    ends = f"<text x=0 y=12>{low:.4g} s</text><text x='100%' y=12 text-anchor=end>{high:.4g} s</text>"
    axis = f"<span></span><svg height=18>{ends}</svg>"
    key = "Dot: a run's median. Bar: p50, with a line to p90. The axis does not start at 0."
    return f"<h2>Step time</h2><div class=strip>{''.join(rows)}{axis}</div><p class=soft>{key}</p>"


def _curves(runs: list[Run]) -> str:
    """The loss of the first run of each arm that has one."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        points = [
            (float(step.number), loss) for step in run.steps if (loss := number(step.values.get("lm loss"))) is not None
        ]
        if len(points) > 1:
            curves.setdefault(run.arm, points[:: -(-len(points) // _CURVE_POINTS)])
    every = [point for points in curves.values() for point in points]
    if not every:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    width, height = (right - left) or 1.0, (high - low) or 1.0
    lines, keys = [], []
    for place, (arm, points) in enumerate(curves.items()):
        path = " ".join(f"{1000 * (x - left) / width:.1f},{200 - 200 * (y - low) / height:.1f}" for x, y in points)
        color = f"var(--c{place % _COLORS})"
        # Equal curves lie on each other: of each line a part stays free for those below it.
        dashes = f" stroke-dasharray='8 {8 * place}'" if place else ""
        lines.append(
            f"<polyline class=curve points='{path}' vector-effect=non-scaling-stroke{dashes} style='stroke:{color}' />"
        )
        keys.append(f"<span class=key style='--key:{color}'>{escape(arm)}</span>")
    return (
        f"<h2>lm loss</h2><p class=soft>{high:.5g} at the top, {low:.5g} at the bottom; steps {left:g} to {right:g}. "
        "First run of each arm.</p>"
        "<svg height=200 viewBox='0 0 1000 200' preserveAspectRatio=none role=img aria-label='lm loss'>"
        f"{''.join(lines)}</svg><p>{''.join(keys)}</p>"
    )


def _timelines(runs: list[Run]) -> str:
    """timeline.svg of the first run of each arm that has one. As images: what is in them can run and load nothing."""
    pictures: dict[str, str] = {}
    for run in runs:
        path = run.path / "timeline.svg"
        if run.arm in pictures or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
            continue
        pictures[run.arm] = _timeline(run.name, path.read_bytes())
    return f"<h2>Timelines</h2>{''.join(pictures.values())}" if pictures else ""


def _timeline(name: str, picture: bytes) -> str:
    caption = f"<figcaption>{escape(name)}: planned above measured</figcaption>"
    if not picture.rstrip().endswith(b"</svg>"):
        return caption + "<p class=soft>timeline.svg is cut off: left out</p>"
    width = least_width(picture[:500].decode("utf-8", "replace"))
    about = f"alt='timeline of {escape(name)}' style='min-width: {width}px'"
    data = base64.b64encode(picture).decode()
    return f"{caption}<figure><img {about} src='data:image/svg+xml;base64,{data}'></figure>"

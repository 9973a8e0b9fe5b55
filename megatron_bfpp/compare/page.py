"""An A/B as one HTML page that needs nothing else: no script, no network. Needs jinja2."""

import base64
from collections.abc import Iterator
from functools import partial
from typing import Any

from ..schedule.names import SCHEDULES
from ..timeline.canvas import least_width
from ..timeline.page import render
from .numbers import Arm, Comparison
from .runs import Run, number
from .text import COLUMNS, headline, sections

_LARGEST_PICTURE = 4_000_000  # bytes of a timeline.svg that is still put into the page
_CURVE_POINTS = 400  # of a loss curve; a pixel has no room for more
_OTHERS = ("#8a3fb0", "#2a7d46", "#c2407e", "#7d8a00")  # of arms that are not named after a schedule


def page(comparison: Comparison, runs: list[Run]) -> str:
    """Return the page of a comparison, with the timelines and loss curves of its runs."""
    finished = "very run finished with the losses of the first."
    return render(
        __package__,
        "report.html",
        headline=headline(comparison),
        is_good=comparison.is_good,
        verdict=f"E{finished}" if comparison.is_good else f"NOT e{finished}",
        run_count=len(runs),
        arms=comparison.arms,
        columns=COLUMNS,
        color=partial(_color, comparison.arms),
        **_step_times(comparison.arms),
        **_curves(runs),
        sections={title: each for title, each in sections(comparison).items() if title != "Result"},
        pictures=list(_pictures(runs)),
    )


def _color(arms: list[Arm], name: str) -> str:
    if name in SCHEDULES:
        return SCHEDULES[name].color
    others = [arm.name for arm in arms if arm.name not in SCHEDULES]
    return _OTHERS[others.index(name) % len(_OTHERS)]


def _step_times(arms: list[Arm]) -> dict[str, Any]:
    """Return the arms that have a strip, and where a time stands on their axis."""
    timed = [arm for arm in arms if arm.step_s_p50 is not None]
    values = [value for arm in timed for value in (*(run.median_s for run in arm.times), arm.step_s_p90 or 0.0)]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def place(value: float) -> str:
        return f"{(value - low) / ((high - low) or 1.0):.2%}"

    return {"timed": timed, "place": place, "shortest": f"{low:.4g} s", "longest": f"{high:.4g} s"}


def _curves(runs: list[Run]) -> dict[str, Any]:
    """Return the loss curve of the first run of each arm that has one, as the points of a line, and their scale."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        losses = ((float(step.number), number(step.values.get("lm loss"))) for step in run.steps)
        points = [(step, loss) for step, loss in losses if loss is not None]
        if len(points) > 1:
            curves.setdefault(run.arm, points[:: -(-len(points) // _CURVE_POINTS)])
    every = [point for points in curves.values() for point in points]
    if not every:
        return {"curves": {}}
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    width, height = (right - left) or 1.0, (high - low) or 1.0
    drawn = {
        arm: " ".join(f"{1000 * (x - left) / width:.1f},{200 - 200 * (y - low) / height:.1f}" for x, y in points)
        for arm, points in curves.items()
    }
    scale = f"{high:.5g} at the top, {low:.5g} at the bottom; steps {left:g} to {right:g}."
    return {"curves": drawn, "scale_of_losses": scale}


def _pictures(runs: list[Run]) -> Iterator[dict[str, Any]]:
    """Yield timeline.svg of the first run of each arm that has one."""
    shown: set[str] = set()
    for run in runs:
        path = run.path / "timeline.svg"
        if run.arm in shown or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
            continue
        shown.add(run.arm)
        picture = path.read_bytes()
        is_whole = picture.rstrip().endswith(b"</svg>")
        yield {
            "name": run.name,
            "data": base64.b64encode(picture).decode() if is_whole else "",
            "least_width": least_width(picture[:500].decode("utf-8", "replace")),
        }

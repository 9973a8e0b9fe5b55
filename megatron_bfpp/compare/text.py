"""An A/B for a terminal and as Markdown: the same cells and the same sentences in both, and in the HTML page.

The table is padded by hand: pipes, logs and mails take plain ASCII, whatever the width of a terminal.
"""

import math
import re
from collections.abc import Callable

from .losses import GRADIENT_NORM, Difference, Match
from .numbers import Arm, Comparison

_MISSING = "-"
# Word in a reason: its name in the table. The first that is found counts.
_KINDS = {"out of memory": "out of memory", "outofmemory": "out of memory", "no end.json": "no end", "kill": "killed"}
_REASON_WIDTH = 160  # characters of a reason below the table


def _number(value: float | None, form: str, form_of_10: str = "", form_of_100: str = "") -> str:
    """Format a number; the forms for those of at least 10 and 100 differ where they are given."""
    if value is None:
        return _MISSING
    return format(value, (value >= 100 and form_of_100) or (value >= 10 and form_of_10) or form)


def _seconds(value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _runs(arm: Arm) -> str:
    """Return how many runs finished, and in short why the others did not."""
    if not arm.failures:
        return str(arm.runs)
    reasons = [each.lower() for each in arm.failures]
    kinds = dict.fromkeys(next((kind for word, kind in _KINDS.items() if word in each), "failed") for each in reasons)
    return f"{arm.runs - len(arm.failures)} of {arm.runs}: {', '.join(kinds)}"


def _peak(arm: Arm) -> str:
    rank = "" if arm.peak_memory_rank is None else f" ({arm.peak_memory_rank})"
    return _number(arm.peak_memory_gib, ".2f") + rank


def _interval(arm: Arm) -> str:
    found = arm.interval
    if found is None:
        return _MISSING
    if found.low is None or found.high is None:
        return found.kind
    return f"{found.low:.4f} to {found.high:.4f}"


COLUMNS: dict[str, Callable[[Arm], str]] = {
    "arm": lambda arm: arm.name,
    "runs": _runs,
    "step time p50 / p90": lambda arm: f"{_seconds(arm.step_s_p50)} / {_seconds(arm.step_s_p90)}",
    "tokens/s/GPU": lambda arm: _number(arm.tokens_per_s_per_gpu, ".3g", form_of_100=",.0f"),
    "TFLOP/s/GPU": lambda arm: _number(arm.tflops_per_gpu, ".3g", form_of_10=".1f"),
    "peak GiB (rank)": _peak,
    "bubble (predicted)": lambda arm: f"{_number(arm.bubble_measured, '.1%')} ({_number(arm.bubble_predicted, '.1%')})",
    "exposed dp": lambda arm: _seconds(arm.exposed_dp_s),
    "time / first arm": lambda arm: _number(arm.ratio, ".4f"),
    "95% interval": _interval,
}


def cells(arm: Arm) -> list[str]:
    return [cell(arm) for cell in COLUMNS.values()]


def terminal(comparison: Comparison) -> str:
    rows = [list(COLUMNS), *map(cells, comparison.arms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for title, sentences in sections(comparison).items():
        lines += ["", f"{title}:", *(f"  {each}" for each in sentences)]
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(map(_escaped, cells(arm)) for arm in comparison.arms)]
    lines = ["# A/B of pipeline schedules", "", *("| " + " | ".join(row) + " |" for row in rows)]
    for title, sentences in sections(comparison).items():
        lines += ["", f"## {title}", "", *(f"- {_escaped(each)}" for each in sentences)]
    return "\n".join(lines) + "\n"


def _escaped(words: str) -> str:
    """Show Markdown's own letters in names and reasons as they are."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", words)


def sections(comparison: Comparison) -> dict[str, list[str]]:
    """Return title -> sentences of what follows the table, without empty ones."""
    failures = [each for arm in comparison.arms for each in arm.failures]
    named = {
        "Result": headline(comparison),
        "Did not finish": [
            each if len(each) <= _REASON_WIDTH else each[: _REASON_WIDTH - 3] + "..." for each in failures
        ],
        "Losses": [each for arm in comparison.arms for each in _losses(arm, comparison.loss_tolerance)],
        f"Configuration, against {comparison.arms[0].name}": [
            f"{name}: {', '.join(f'{key} {ours} -> {theirs}' for key, (ours, theirs) in found.items())}"
            if found
            else f"{name}: nothing that is recorded"
            for name, found in comparison.changed.items()
        ],
        "Notes": comparison.notes,
        "What was compared": [f"{name}: {value}" for name, value in comparison.facts.items()],
        "How to read it": _explained(comparison),
    }
    return {title: sentences for title, sentences in named.items() if sentences}


def headline(comparison: Comparison) -> list[str]:
    """Return a sentence for each arm but the first: faster or slower by how much, or that no difference can be told."""
    first, *others = comparison.arms
    return [_headline(arm, first.name) for arm in others]


def _headline(arm: Arm, first: str) -> str:
    if arm.ratio is None:
        return f"{arm.name} cannot be compared with {first}: one of them has no timed step"
    less = f"its step takes {abs(1 - arm.ratio):.1%} {'less' if arm.ratio < 1 else 'more'} time"
    found = arm.interval
    if found is None or found.low is None or found.high is None:
        reason = found.kind.removeprefix("none: ") if found else "no runs"
        return f"{arm.name} against {first}: {less}; whether by chance is unknown, without an interval ({reason})"
    if found.low <= 1 <= found.high:
        between = f"between {found.low - 1:+.1%} and {found.high - 1:+.1%}"
        return f"No difference between {arm.name} and {first} can be told: step time {between} (95% interval)"
    low, high = sorted(abs(1 - bound) for bound in (found.low, found.high))
    faster = "faster" if found.high < 1 else "slower"
    return f"{arm.name} is {faster} than {first}: {less} (95% interval {low:.1%} to {high:.1%})"


def _losses(arm: Arm, tolerance: float) -> list[str]:
    """Return a sentence for all runs of the arm with the losses of the reference, and one for each other run."""
    same = [each for each in arm.losses if each.is_comparable and each.losses is None]
    sentences = [_same(arm, same)] if same else []
    for each in arm.losses:
        if not each.is_comparable:
            sentences.append(f"{each.run}: nothing to compare: {_steps(each.steps)}")
        elif each.losses is not None:
            within = f", within the tolerance {tolerance:g}" if each.losses.largest <= tolerance else ""
            sentences.append(f"{each.run}: losses DIFFER{within}: {_difference(each.losses)}, of {_steps(each.steps)}")
    unmatched = sorted({name for each in arm.losses for name in each.unmatched})
    if unmatched:
        names = ", ".join(map(repr, unmatched))
        sentences.append(f"{arm.name}: only one side has {names} at some step, which is left out")
    return sentences


def _same(arm: Arm, same: list[Match]) -> str:
    steps = _steps(min(each.steps for each in same))
    all_bits = all(each.all_bits for each in same)
    how = "bit-identical" if all_bits else "equal as printed (not all values have their bits in the files)"
    norms, more = [each.gradient_norm for each in same if each.gradient_norm], ""
    if norms:
        more = f"; gradient norms differ: {_difference(max(norms, key=lambda each: each.largest))}"
    elif all(GRADIENT_NORM in each.names for each in same):
        more = ", gradient norms too"
    return f"{arm.name}: {how} over {steps} in {len(same)} of {len(arm.losses)} compared runs{more}"


def _difference(found: Difference) -> str:
    size = f"{found.largest:.2g}" if math.isfinite(found.largest) else "not a number"
    where = f"({found.name}, step {found.largest_step})"
    return f"from step {found.first_step} on, largest relative difference {size} {where}"


def _steps(count: int) -> str:
    return f"{count} common step{'' if count == 1 else 's'}"


def _explained(comparison: Comparison) -> list[str]:
    kinds = ", ".join(f"{arm.name} {arm.interval.kind}" for arm in comparison.arms if arm.interval)
    return [
        f"The first {comparison.warmup} steps after each start of a process are dropped as warm-up.",
        "Traced steps, and the step after them, are not timed.",
        "p50 and p90: the median over runs of each run's median and 90th percentile.",
        "Time / first arm is the ratio of the p50; below 1 is faster than the first arm.",
        f"The interval is of the mean ratio over runs{f' ({kinds})' if kinds else ''}: steps are not independent.",
        "TFLOP/s by Megatron's formula, which counts the same for every arm.",
        "Peak memory: the largest of any rank and step, in GiB.",
    ]

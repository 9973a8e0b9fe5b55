"""A 95 % interval of the ratio of two arms' step times. scipy, where it is installed.

Over runs: the steps inside a run are not independent.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Of the mean ratio (geometric, over runs). Without one low and high are None; `kind` says which or why not."""

    low: float | None
    high: float | None
    kind: str


def ratio_interval(runs: dict[int | str, float], reference: dict[int | str, float]) -> Interval:
    """Of runs / reference. Both: round (an int) or another name of a run -> its median step time in seconds.

    Runs of the same round had the same state of the cluster: with two or more common rounds their ratios are compared
    (paired t on logarithms). Otherwise Welch's t on the logarithms of all runs.
    """
    if len(runs) < 2 or len(reference) < 2:
        return Interval(None, None, f"none: {_count(min(len(runs), len(reference)))}")
    try:
        from scipy import stats
    except ImportError:
        return Interval(None, None, "none: no scipy")
    rounds = [each for each in runs if isinstance(each, int) and each in reference]
    paired = len(rounds) >= 2
    ours = [math.log(runs[key]) for key in (rounds if paired else runs)]
    theirs = [math.log(reference[key]) for key in (rounds if paired else reference)]
    kind = f"paired over {len(rounds)} rounds" if paired else f"Welch over {len(ours)} and {len(theirs)} runs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runs that all took the very same time
        test = stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
        low, high = (math.exp(float(bound)) for bound in test.confidence_interval(CONFIDENCE))
    if not low < high < math.inf:
        return Interval(None, None, "none: no spread")
    return Interval(low, high, kind)


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"

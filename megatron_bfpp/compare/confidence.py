"""Computes a 95 % interval of the ratio of two arms' step times, with scipy where it is installed.

It is taken over runs: the steps inside a run are not independent.
"""

import math
import warnings
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Bounds of the mean ratio (geometric, over runs), None where there are none. kind: of the test, or why not."""

    low: float | None
    high: float | None
    kind: str


def ratio_interval(runs: dict[int | str, float], reference: dict[int | str, float]) -> Interval:
    """Return the interval of runs / reference. Both: round (an int) or another name of a run -> median step in seconds.

    Runs of the same round met the same state of the cluster: with two or more common rounds their ratios are compared
    (paired t on logarithms). Otherwise Welch's t compares the logarithms of all runs.
    """
    if len(runs) < 2 or len(reference) < 2:
        count = min(len(runs), len(reference))
        return Interval(None, None, f"none: {count} run{'' if count == 1 else 's'}")
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
        warnings.simplefilter("ignore", RuntimeWarning)  # runs may all take the very same time
        test = stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
        low, high = (math.exp(float(bound)) for bound in test.confidence_interval(CONFIDENCE))
    if not low < high < math.inf:
        return Interval(None, None, "none: no spread")
    return Interval(low, high, kind)

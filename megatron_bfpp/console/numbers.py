"""Types of numbers for argparse, which refuse what is out of range as the command line is read. Standard library only.

parser.add_argument("--repeat", type=at_least(1))
parser.add_argument("--hop", type=between(0, 10_000))
parser.add_argument("--bandwidth", type=positive)
"""

import argparse
import math
from collections.abc import Callable

__all__ = ["at_least", "between", "positive"]

_MOST = 10**9  # of counts: larger ones are slips of the keyboard, and no longer exact or finite as a float


def at_least(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Return the type of a whole number from `least` to `most`, both included."""
    wanted = f"a whole number of at least {least}" if most == _MOST else f"a whole number from {least} to {most}"

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refusal(text, wanted) from None
        if not least <= value <= most:
            raise _refusal(text, f"a whole number from {least} to {most}" if value > most else wanted)
        return value

    return parsed


def between(least: float, most: float) -> Callable[[str], float]:
    """Return the type of a finite number from `least` to `most`, both included."""
    return _real(lambda value: least <= value <= most, f"a number from {least:g} to {most:g}")


def positive(text: str) -> float:
    """Read a finite number above 0."""
    return _real(lambda value: value > 0, "a number above 0")(text)


def _real(is_good: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _refusal(text, wanted) from None
        if not math.isfinite(value) or not is_good(value):
            raise _refusal(text, wanted)
        return value

    return parsed


def _refusal(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

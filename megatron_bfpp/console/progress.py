"""A bar of progress on a terminal, on standard error, so that output can be piped. Standard library only."""

import sys
import time


def show(part: float, text: str) -> None:
    """Draw the bar with `text` beside it, if standard error is a terminal. part: of the whole, 0 to 1."""
    if sys.stderr.isatty():
        print(f"\r\033[K[{'#' * int(20 * part):<20}] {text}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    """Take the bar away."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


class Steps:
    """A bar for steps that take alike long, with the time that is left. Leaving the `with` block removes it.

    lines: a word under which every twentieth of the steps is reported where standard error is no terminal; "" for none.
    """

    def __init__(self, total: int, start: str, lines: str = ""):
        self._total, self._lines, self._done, self._started = total, lines, 0, time.monotonic()
        show(0.0, start)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        clear()

    def step(self, text: str) -> None:
        """Count one more step as done."""
        self._done += 1
        left_s = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        show(self._done / self._total, f"{text}, about {left_s:.0f} s left")
        if self._lines and not sys.stderr.isatty() and self._done % max(1, self._total // 20) == 0:
            print(f"{self._lines}: {self._done} of {self._total} steps", file=sys.stderr, flush=True)

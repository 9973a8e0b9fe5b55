"""A bar of progress on a terminal, on standard error, so that output can be piped. Standard library only."""

import sys


def show(part: float, text: str) -> None:
    """Draw the bar with `text` beside it, if standard error is a terminal. part: of the whole, 0 to 1."""
    if sys.stderr.isatty():
        print(f"\r\033[K[{'#' * int(20 * part):<20}] {text}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    """Take the bar away."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)

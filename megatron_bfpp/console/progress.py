"""A bar of progress on a terminal, on standard error: what a command prints can be piped. Standard library only."""

import sys


def show(part: float, text: str) -> None:
    """part: of the whole, 0 to 1. Nothing where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K[{'#' * int(20 * part):<20}] {text}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)

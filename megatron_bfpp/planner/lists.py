"""Types for argparse of the lists that bfpp plan takes: 8 or 4,8 or 64-512 (doubling), and words."""

import argparse
from collections.abc import Callable

__all__ = ["doubling", "numbers", "one_of"]

_MOST = 2**31


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) < _MOST


def numbers(text: str) -> tuple[int, ...]:
    """Read 8 or 4,8."""
    parts = [part.strip() for part in text.split(",")]
    if not all(map(_is_count, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0, such as 8 or 4,8")
    return tuple(dict.fromkeys(map(int, parts)))


def doubling(text: str) -> tuple[int, ...]:
    """Read 64 or 64,128 or 64-512, which doubles from the first to the last."""
    first, dash, last = text.partition("-")
    if not dash:
        return numbers(text)
    if not (_is_count(first) and _is_count(last) and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range, such as 64-512: from, to; doubling in between")
    return tuple(int(first) << power for power in range((int(last) // int(first)).bit_length()))


def one_of(words: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of a list of such words."""

    def parsed(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in words:
                raise argparse.ArgumentTypeError(f"{name!r} does not exist; use one of {', '.join(words)}")
        return names

    return parsed

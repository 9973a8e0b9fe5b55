"""Which layers a pipeline stage holds."""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Stage", "stages_of"]


class Stage(NamedTuple):
    """A run of layers. The first stage has the embedding too, and the last one the head."""

    first: int  # number of its first layer, from 0
    layers: int
    mtp: int = 0  # layers of multi-token prediction
    is_first: bool = False
    is_last: bool = False


@cache
def stages_of(layers: tuple[int, ...], mtp: int = 0, mtp_stage: int = -1) -> tuple[Stage, ...]:
    """Return the stages in order. layers: how many each has. mtp: layers of multi-token prediction, on one of them."""
    last, on = len(layers) - 1, mtp_stage % len(layers)
    firsts = [0, *accumulate(layers)]
    return tuple(
        Stage(firsts[number], count, mtp if number == on else 0, number == 0, number == last)
        for number, count in enumerate(layers)
    )

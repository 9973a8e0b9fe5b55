"""What a rank did when. Standard library only."""

from typing import NamedTuple

from ..schedule.ir import Action

ACTION, P2P, DP = "action", "p2p", "dp"  # kinds of an interval: an action, or a wait for a message or a replica


class Interval(NamedTuple):
    """An action, or a wait for it. Times are in nanoseconds, everywhere up to a file; measured.py has milliseconds."""

    action: Action
    kind: str  # ACTION, P2P, DP
    start: float
    end: float

"""What a rank did when. Standard library only."""

from __future__ import annotations

from typing import NamedTuple

ACTION, P2P, DP = "action", "p2p", "dp"  # what an interval is: an action, or a wait for a message or for a replica


class Interval(NamedTuple):
    """An action, or a wait for what `name` says."""

    name: str
    kind: str  # ACTION, P2P, DP
    start: int  # nanoseconds
    end: int

"""One network for the messages and collectives of all ranks: schedule/cards.py, in memory that the processes share.

The end of a transfer depends on what begins meanwhile, so it is not known before it is past: a waiting rank sleeps
until the next possible end, and looks again. On a GPU too a wait holds back the rank's next action, so that it launches
nothing later that belongs earlier.
"""

import pickle
import time
from typing import Any

from ...schedule.cards import Cards, Transfer, receiving, sending

_BYTES = 1 << 18  # of the pickled cards: about 150 for each transfer that is under way or queued
_PER_OWNER = 4096  # transfers whose ends are kept
_SHORTEST_SLEEP_S = 0.0005


class SharedCards:
    """The cards of `ranks` ranks.

    Transfers have owners: a rank for its messages, ranks + r for the collectives of the group whose first rank is r.
    behind_s: how far the cards stay behind real time, since ranks report a transfer a little after it began; shorter
    than
        any work, which then starts in time. What a busy machine holds up for longer begins late: `late_s` is the worst
        of this process.
    """

    def __init__(self, context: Any, ranks: int, full_duplex: bool, behind_s: float):
        self.late_s = 0.0
        self._state = context.Array("c", _BYTES)
        self._ends = context.Array("d", 2 * ranks * _PER_OWNER, lock=False)
        self._full_duplex, self._behind_s = full_duplex, behind_s
        self._save(Cards())

    def ticket(self, owner: int, number: int) -> int:
        """Return the positive number that names the owner's number-th transfer."""
        return owner * _PER_OWNER + number % _PER_OWNER + 1

    def begin_message(self, ticket: int, start_s: float, duration_s: float, sender: int, receiver: int) -> None:
        self._begin(ticket, start_s, duration_s, (self._out(sender), self._in(receiver)), (sender, receiver))

    def begin_collective(self, ticket: int, start_s: float, duration_s: float, ranks: list[int]) -> None:
        """Begin a collective, in both directions of every member's card, as in a ring."""
        places = tuple(place for rank in ranks for place in {self._out(rank), self._in(rank)})
        self._begin(ticket, start_s, duration_s, places, ranks[0])

    def wait(self, ticket: int) -> float:
        """Wait for the end of a transfer and return when it was, of time.monotonic()."""
        while True:
            with self._state.get_lock():
                cards = self._load()
                self._pass_time(cards)
                end_s = self._ends[ticket - 1]
                next_s = cards.next_end()
            if end_s:
                return float(end_s)
            sleep_s = 0.0 if next_s is None else next_s + self._behind_s - time.monotonic()
            time.sleep(max(_SHORTEST_SLEEP_S, sleep_s))

    def _begin(self, ticket: int, start_s: float, duration_s: float, places: tuple[Any, ...], queue: Any) -> None:
        with self._state.get_lock():
            cards = self._load()
            self._ends[ticket - 1] = 0.0
            self.late_s = max(self.late_s, cards.now - start_s)
            cards.begin(Transfer(ticket, duration_s, places, queue), start_s)
            self._pass_time(cards)

    def _pass_time(self, cards: Cards) -> None:
        until_s = time.monotonic() - self._behind_s
        while done := cards.step(until_s):
            for ticket in done:
                self._ends[ticket - 1] = cards.now
        self._save(cards)

    def _out(self, rank: int) -> Any:
        return sending(rank)

    def _in(self, rank: int) -> Any:
        return receiving(rank) if self._full_duplex else sending(rank)

    def _load(self) -> Cards:
        return pickle.loads(self._state.get_obj())  # type: ignore[no-any-return]

    def _save(self, cards: Cards) -> None:
        content = pickle.dumps(cards)
        if len(content) > _BYTES:
            raise RuntimeError(f"{len(content)} bytes of transfers are under way or queued; there is room for {_BYTES}")
        self._state.get_obj()[: len(content)] = content

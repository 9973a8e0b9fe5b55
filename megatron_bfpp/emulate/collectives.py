"""Emulated data-parallel collectives: the real one, whose result counts, and the time that it would take.

A collective begins when the last rank of its group has launched it and the ones before it are done: one at a time, in the order of
their launch, as on a NCCL communicator. All ranks of the group learn the same beginning, from a small all-reduce that runs
beside the real collective. Its time passes on a card of its own, or on the card of the messages (network.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .network import COLLECTIVE_FROM, COLLECTIVE_UNTIL, NUMBERS_PER_CARD, PROLONGED, Network


@dataclass(eq=False)
class Collective:
    """One that this rank has launched. end_s: of time.monotonic(), once it is known."""

    told: torch.Tensor  # (launch, duration), and in the end the latest and longest of the group
    work: dist.Work
    end_s: float | None = None
    prolonged_s: float = 0.0  # by how much messages had prolonged collectives when the end was told


class Collectives:
    """The collectives of this rank in one group."""

    def __init__(self, network: Network, group: dist.ProcessGroup):
        self.are_free = False  # then they take no time
        self._network, self._group = network, group
        self._launched: deque[Collective] = deque()  # whose end is not known
        self._free_s = 0.0
        self._ranks = dist.get_process_group_ranks(group)
        if network.link.collectives_share_card:
            network.before_message = self._look

    def launch(self, duration_s: float) -> Collective:
        """A collective of what the compute stream has made so far."""
        duration_s = 0.0 if self.are_free else self._network.drawn(duration_s)
        told = torch.tensor([self._network.stream_s, duration_s], dtype=torch.float64)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        collective = Collective(told, work)
        self._launched.append(collective)
        return collective

    def wait(self, collective: Collective) -> None:
        """Have the compute stream wait for its end."""
        while collective.end_s is None:
            self._tell_end(self._launched.popleft())
        late_s = 0.0
        if self._network.link.collectives_share_card:
            late_s = self._prolonged_s() - collective.prolonged_s
        self._network.wait_until(collective.end_s + late_s)

    def _look(self) -> None:
        while self._launched and self._launched[0].work.is_completed():
            self._tell_end(self._launched.popleft())

    def _tell_end(self, collective: Collective) -> None:
        collective.work.wait()
        launched_s, duration_s = collective.told.tolist()
        network = self._network
        if not network.link.collectives_share_card:
            self._free_s = collective.end_s = max(launched_s, self._free_s) + duration_s
            return
        first = NUMBERS_PER_CARD * dist.get_rank()
        cards = network.cards
        with cards.get_lock():
            if launched_s > cards[first + COLLECTIVE_UNTIL]:
                cards[first + COLLECTIVE_FROM] = cards[first + COLLECTIVE_UNTIL] = launched_s
            cards[first + COLLECTIVE_UNTIL] += duration_s
            collective.end_s = cards[first + COLLECTIVE_UNTIL]
        collective.prolonged_s = self._prolonged_s()

    def _prolonged_s(self) -> float:
        """A collective is as slow as its slowest rank."""
        return max(self._network.cards[NUMBERS_PER_CARD * rank + PROLONGED] for rank in self._ranks)

"""Emulated data-parallel collectives: the real one, whose result counts, and the time that it would take.

A collective begins when the last rank of its group has launched it and the ones before it are done: one at a time, in
the order of their launch, as on a NCCL communicator. All ranks of the group learn the same beginning, from a small
all-reduce that runs beside the real collective. Its time passes on a card of its own, or on that of the messages
(shared_card.py), where a thread of the group's first rank begins it: the rank itself may be asleep.
"""

import queue
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from .network import Network


@dataclass(eq=False)
class Collective:
    """A launched collective. end_s: of time.monotonic(), once it is known."""

    times: torch.Tensor  # (launch, duration), and in the end the latest and longest of the group
    work: dist.Work
    number: int  # of those of the group
    end_s: float | None = None


class Collectives:
    """The collectives of this rank in one group."""

    def __init__(self, network: Network, group: dist.ProcessGroup):
        self.network = network
        self.are_free = False  # then they take no time
        self._group = group
        self._launched: deque[Collective] = deque()  # whose end is not known
        self._free_s = 0.0
        self._count = 0
        self._ranks = dist.get_process_group_ranks(group)
        self._to_begin: queue.SimpleQueue[Collective] = queue.SimpleQueue()
        self._begins = network.shared is not None and dist.get_rank() == self._ranks[0]
        if self._begins:
            threading.Thread(target=self._begin_all, daemon=True).start()

    def launch(self, duration_s: float) -> Collective:
        """Launch a collective of what the compute stream has made so far."""
        queue = self.network.queue
        if queue is not None:
            queue.begin(self._group)
        duration_s = 0.0 if self.are_free else self.network.drawn(duration_s)
        times = torch.tensor([self.network.stream_s, duration_s], dtype=torch.float64)
        work = dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        collective = Collective(times, work, self._count)
        self._count += 1
        self._launched.append(collective)
        if self._begins:
            self._to_begin.put(collective)
        if queue is not None:
            queue.launched(self._group, partial(self._end_of, collective))
        return collective

    def wait(self, collective: Collective) -> None:
        """Have the compute stream wait for the end of a collective."""
        self.network.wait_until(self._end_of(collective))

    def _end_of(self, collective: Collective) -> float:
        while collective.end_s is None:
            self._learn_end(self._launched.popleft())
        return collective.end_s

    def _learn_end(self, collective: Collective) -> None:
        collective.work.wait()
        launched_s, duration_s = collective.times.tolist()
        shared = self.network.shared
        if shared is None or not duration_s:
            self._free_s = collective.end_s = max(launched_s, self._free_s) + duration_s
        else:
            self._free_s = collective.end_s = shared.wait(self._ticket(collective))

    def _ticket(self, collective: Collective) -> int:
        assert self.network.shared is not None, "the card is not shared"
        return self.network.shared.ticket(dist.get_world_size() + self._ranks[0], collective.number)

    def _begin_all(self) -> None:
        shared = self.network.shared
        assert shared is not None, "the card is not shared"
        while True:
            collective = self._to_begin.get()
            collective.work.wait()
            launched_s, duration_s = collective.times.tolist()
            if duration_s:
                shared.begin_collective(self._ticket(collective), launched_s, duration_s, self._ranks)

"""An emulated network for real processes: torch.distributed's isend and irecv, with the time that a message would take.

The processes, the process groups (gloo), the order of the calls and every wait are real; only durations are modelled,
and they pass in real time. Each rank has the clock of a GPU's compute stream (`Network.stream_s`): a stage (stages.py)
starts when the stream is free and sleeps until it would be done; a wait() makes the stream wait, as it does under NCCL.
What a rank's Python does in between is hidden behind the work of the stream, as on a GPU, unless it takes longer than
that work. A message carries the beginning of its transfer; the receiver's stream waits until

    max(begin, receive posted) + transfer (size / bandwidth) + hop (latency, + jitter)

and the sender's, if the schedule waits for a send, until begin + transfer. Transfers that leave one network card queue
up in the order of their launch; with a half-duplex card, those that arrive at it as well. Data-parallel collectives
(collectives.py) have a card of their own, or share this one: then each of the n transfers that are under way in a
direction of a card has an n-th of it (shared_card.py), and its end is known when it has ended.

Emulated are dependencies, orders and waits of a schedule, overlap of messages with compute, queues at a card, and one
hardware queue of a GPU (queue.py). Not emulated are a host too slow for its GPU's queue, communication kernels that
take SMs from compute, congestion between different cards, and, with a hardware queue for each stream, the in-order
streams of NCCL communicators (schedule/check.py has those; arms whose messages share one are flattered).
"""

import time
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch.distributed as dist

from ...runtime.weight_gradients import OwedGradients
from ...schedule import Op
from ...schedule.costs import at
from ..case import NUMBERS_PER_CARD, Case
from .queue import HardwareQueue
from .shared_card import SharedCards


class Way(NamedTuple):
    """The way of a message between two ranks. is_shared: on a card that collectives use too."""

    transfer_s: float
    latency_s: float
    is_shared: bool
    in_node: bool


def sleep_until(moment_s: float) -> None:
    """Sleep until a moment of time.monotonic(), the one clock of all processes of a machine."""
    left = moment_s - time.monotonic()
    if left > 0:
        time.sleep(left)


_SENDING, _RECEIVING = range(2)
_OF_NODE = 2


@dataclass
class Network:
    """The emulated card of this rank, which knows the cards of all ranks."""

    case: Case
    cards: Any  # of case.Memory
    shared: SharedCards | None = None  # where collectives share the card
    scale: float = 1.0  # of all durations; 0 for a step that only makes plans and process groups
    stream_s: float = 0.0  # until when the compute stream of this rank has work, of time.monotonic()
    random: Random = field(default_factory=Random)
    sent: int = 0  # messages of this rank on the shared card
    queue: HardwareQueue | None = None  # where there is one for all streams
    backward: Op = Op.B  # what torch runs of a backward now: both gradients, the input's (I) or the weights' (W)
    owed: OwedGradients | None = None  # in a step of this plugin that splits its backwards

    def __post_init__(self) -> None:
        if self.case.connections == 1:
            self.queue = HardwareQueue(self.wait_until)

    def drawn(self, duration_s: float) -> float:
        """Return a duration as it happens to be this time; never below half of it."""
        jitter = max(0.5, self.random.gauss(1.0, self.case.jitter)) if self.case.jitter else 1.0
        return duration_s * self.scale * jitter

    def way_to(self, other: int) -> Way:
        """Return the way between this rank and a neighbour in its pipeline.

        Global rank = pp_rank * replicas + replica, as Megatron numbers them.
        """
        case, costs = self.case, self.case.costs
        here, there = dist.get_rank() // case.replicas, other // case.replicas
        edge = here if (here + 1) % case.shape.pp_size == there else there  # edge e joins ranks e and e + 1
        transfer_s, in_node = self.scale * at(costs.transfer, edge), here // case.node_size == there // case.node_size
        is_shared = self.shared is not None and transfer_s > 0 and not in_node
        return Way(transfer_s, at(costs.hop, edge), is_shared, in_node)

    def work(self, duration_s: float) -> float:
        """Put work on the compute stream; return when it will be done."""
        self.stream_s += self.drawn(duration_s)
        return self.stream_s

    def wait_until(self, moment_s: float) -> None:
        """Have the compute stream wait."""
        self.stream_s = max(self.stream_s, moment_s)

    def occupy(self, sender: int, receiver: int, duration_s: float, in_node: bool = False) -> float:
        """Take the cards, or the links of the node, for a transfer of the stream's output; return when it begins."""
        if duration_s == 0:
            # Ranks come here in the order of real time, which differs a little from that of the streams; nothing may
            # wait for that.
            return self.stream_s
        taken = [self._index(*end) + _OF_NODE * in_node for end in ((sender, _SENDING), (receiver, _RECEIVING))]
        with self.cards.get_lock():
            begin: float = max(self.stream_s, *(self.cards[index] for index in taken))
            for index in taken:
                self.cards[index] = begin + duration_s
        return begin

    def launch(self, receiver: int, way: Way) -> float:
        """Send a message of what the stream has made.

        Returns the mark that it carries: when it begins, or on a shared card its ticket.
        """
        if self.shared is None or not way.is_shared:
            return self.occupy(dist.get_rank(), receiver, way.transfer_s, way.in_node)
        ticket = self.shared.ticket(dist.get_rank(), self.sent)
        self.sent += 1
        self.shared.begin_message(ticket, self.stream_s, way.transfer_s, dist.get_rank(), receiver)
        return ticket

    def left_s(self, mark: float, way: Way, posted_s: float = 0.0) -> float:
        """Return when the message that carries `mark` has left the cards. posted_s: when its receive was posted."""
        if self.shared is None or not way.is_shared:
            return max(mark, posted_s) + way.transfer_s
        return max(self.shared.wait(int(mark)), posted_s + way.transfer_s)

    def _index(self, rank: int, direction: int) -> int:
        return NUMBERS_PER_CARD * rank + (direction if self.case.full_duplex else _SENDING)

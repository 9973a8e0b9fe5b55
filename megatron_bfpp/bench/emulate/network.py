"""An emulated network for real processes: torch.distributed's isend and irecv, with the time that a message would take.

The processes, the process groups (gloo), the order of the calls and every wait are real; only durations are modelled, and they
pass in real time. Each rank has the clock of a GPU's compute stream (`Network.stream_s`): a stage (stages.py) starts when the
stream is free and sleeps until it would be done; a wait() makes the stream wait, as it does under NCCL. What a rank's Python
does in between is hidden behind the work of the stream, as on a GPU, unless it takes longer than that work. A message says
when its transfer began; the receiver's stream waits until

    max(begin, receive posted) + size / bandwidth + latency (+ jitter)

and the sender's, if the schedule waits for a send, until begin + size / bandwidth. Transfers that leave one network card queue
up in the order of their launch; with a shared (half-duplex) card, those that arrive at it as well. Data-parallel collectives
(collectives.py) have a card of their own, or share this one: then each of the n transfers that are under way in a direction of a card
has a n-th of it (shared_card.py), and when one ends is known when it has ended.

What it stands for: dependencies, orders and waits of a schedule, overlap of messages with compute, queues at a card. What it
does not: a host too slow for its GPU's queue, communication kernels that take SMs from compute, in-order streams of NCCL
communicators (schedule/check.py has those; arms whose messages share one are flattered), congestion between different cards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from .shared_card import SharedCards


class Lock(Protocol):
    def __enter__(self) -> object: ...
    def __exit__(self, *error: object) -> object: ...


class Shared(Protocol):
    """What of multiprocessing.Array("d", ...) is used: numbers that all ranks see, and a lock."""

    def get_lock(self) -> Lock: ...
    def __getitem__(self, index: int) -> float: ...
    def __setitem__(self, index: int, value: float) -> None: ...


@dataclass(frozen=True)
class Link:
    """The network of one run. Times in seconds, sizes in bytes."""

    name: str = "none"
    latency_s: float = 0.0
    bandwidth: float = float("inf")  # bytes per second and direction of a card
    full_duplex: bool = True
    collectives_share_card: bool = False  # else they have a card of their own
    jitter: float = 0.0  # standard deviation of latency and compute times, as a part of them
    # Pipeline ranks in a node. Messages within a node have its own link, which nothing else uses.
    node_size: int = 1
    node_latency_s: float = 0.0
    node_bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        if (
            min(self.latency_s, self.node_latency_s) < 0
            or min(self.bandwidth, self.node_bandwidth) <= 0
            or not 0 <= self.jitter < 1
        ):
            raise ValueError(
                f"network {self.name}: latency {self.latency_s} s, bandwidth {self.bandwidth} bytes/s, jitter {self.jitter}; "
                "they must be at least 0, above 0, and in [0, 1)"
            )


class Way(NamedTuple):
    """What a message between two ranks takes. is_shared: on a card that collectives use too."""

    transfer_s: float
    latency_s: float
    is_shared: bool
    in_node: bool


def sleep_until(moment_s: float) -> None:
    """moment_s: of time.monotonic(), the one clock of all processes of a machine."""
    left = moment_s - time.monotonic()
    if left > 0:
        time.sleep(left)


# What the shared numbers of a rank are: until when its card, and its link within the node, send and receive; one of the two for both
# if not full-duplex.
SENDING, RECEIVING = range(2)
OF_NODE = 2
NUMBERS_PER_CARD = 4


@dataclass
class Network:
    """The emulated card of this rank, which knows the cards of all ranks.

    message_bytes: of one message between stages, whatever the size of the tensor that stands for it.
    """

    link: Link
    message_bytes: float
    cards: Shared  # NUMBERS_PER_CARD of every rank
    scale: float = 1.0  # of all durations; 0 for a step that only makes plans and process groups
    stream_s: float = 0.0  # until when the compute stream of this rank has work, of time.monotonic()
    random: random.Random = field(default_factory=random.Random)
    shared: SharedCards | None = None  # where collectives share the card
    sent: int = 0  # messages of this rank on the shared card
    replicas: int = 1  # of the pipeline: global rank = pp_rank * replicas + replica, as Megatron numbers them

    def drawn(self, duration_s: float) -> float:
        """A duration as it happens to be this time; never below half of it."""
        jitter = max(0.5, self.random.gauss(1.0, self.link.jitter)) if self.link.jitter else 1.0
        return duration_s * self.scale * jitter

    def way_to(self, other: int) -> Way:
        """Between this rank and a neighbour in its pipeline."""
        link, here, there = self.link, dist.get_rank() // self.replicas, other // self.replicas
        if here // link.node_size == there // link.node_size:
            return Way(self.scale * self.message_bytes / link.node_bandwidth, link.node_latency_s, False, True)
        transfer_s = self.scale * self.message_bytes / link.bandwidth
        return Way(transfer_s, link.latency_s, self.shared is not None and transfer_s > 0, False)

    def work(self, duration_s: float) -> float:
        """Put work on the compute stream; when it will be done."""
        self.stream_s += self.drawn(duration_s)
        return self.stream_s

    def wait_until(self, moment_s: float) -> None:
        """Have the compute stream wait."""
        self.stream_s = max(self.stream_s, moment_s)

    def occupy(self, sender: int, receiver: int, duration_s: float, in_node: bool = False) -> float:
        """When a transfer of `duration_s` of what the stream has made begins; the cards, or the links of the node, are taken for it."""
        if duration_s == 0:
            # Ranks come here in the order of real time, which differs a little from that of the streams; nothing may wait for that.
            return self.stream_s
        taken = [self._index(*end) + OF_NODE * in_node for end in ((sender, SENDING), (receiver, RECEIVING))]
        with self.cards.get_lock():
            begin = max(self.stream_s, *(self.cards[index] for index in taken))
            for index in taken:
                self.cards[index] = begin + duration_s
        return begin

    def _launch(self, receiver: int, way: Way) -> float:
        """Send a message of what the stream has made; what it carries: when it begins, or on a shared card its ticket."""
        if self.shared is None or not way.is_shared:
            return self.occupy(dist.get_rank(), receiver, way.transfer_s, way.in_node)
        ticket = self.shared.ticket(dist.get_rank(), self.sent)
        self.sent += 1
        self.shared.begin_message(ticket, self.stream_s, way.transfer_s, dist.get_rank(), receiver)
        return ticket

    def left_s(self, mark: float, way: Way, posted_s: float = 0.0) -> float:
        """When a message has left the cards that carries `mark`, and whose receive was posted then."""
        if self.shared is None or not way.is_shared:
            return max(mark, posted_s) + way.transfer_s
        return max(self.shared.wait(int(mark)), posted_s + way.transfer_s)

    def _index(self, rank: int, direction: int) -> int:
        return NUMBERS_PER_CARD * rank + (direction if self.link.full_duplex else SENDING)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace isend and irecv for everybody: this plugin, Megatron and torch.distributed.pipelining look them up here."""
        real = dist.isend, dist.irecv

        def isend(
            tensor: torch.Tensor, dst: int | None = None, group: Any = None, tag: int = 0, **more: Any
        ) -> dist.Work:
            target = dist.get_global_rank(group or dist.group.WORLD, more["group_dst"]) if dst is None else dst
            way = self.way_to(target)
            mark = self._launch(target, way)
            wire = stamped(tensor, mark)
            work = real[0](wire, dst, group=group, tag=tag, **more)
            return _Sent(self, work, wire, mark, way)

        def irecv(
            tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0, **more: Any
        ) -> dist.Work:
            posted = self.stream_s
            source = dist.get_global_rank(group or dist.group.WORLD, more["group_src"]) if src is None else src
            way = self.way_to(source)
            work = real[1](tensor, src, group=group, tag=tag, **more)
            return _Received(self, work, tensor, posted, way, self.drawn(way.latency_s))

        with _replaced(isend, irecv):
            yield


@contextmanager
def _replaced(isend: Callable[..., dist.Work], irecv: Callable[..., dist.Work]) -> Iterator[None]:
    before = {module: (module.isend, module.irecv) for module in (dist, c10d)}
    for module in before:
        module.isend, module.irecv = isend, irecv  # P2POp compares with the names of c10d
    try:
        yield
    finally:
        for module, functions in before.items():
            module.isend, module.irecv = functions


def stamped(tensor: torch.Tensor, mark: float) -> torch.Tensor:
    """A copy whose last number says when its transfer began, or on a shared card its ticket. Stages ignore that number; float64 holds a nanosecond."""
    if tensor.dtype is not torch.float64:  # a shape that is passed on, not a stage's tensor
        return tensor.detach()
    wire = tensor.detach().clone()
    wire.view(-1)[-1] = mark
    return wire


class _Sent(dist.Work):
    def __init__(self, network: Network, work: dist.Work, wire: torch.Tensor, mark: float, way: Way):
        super().__init__()
        self._network, self._work, self._wire = network, work, wire
        self._mark, self._way = mark, way

    def wait(self, timeout: Any = None) -> bool:
        self._work.wait()
        self._network.wait_until(self._network.left_s(self._mark, self._way))
        return True


class _Received(dist.Work):
    def __init__(
        self, network: Network, work: dist.Work, buffer: torch.Tensor, posted_s: float, way: Way, latency_s: float
    ):
        super().__init__()
        self._network, self._work, self._buffer = network, work, buffer
        self._posted_s, self._way, self._latency_s = posted_s, way, latency_s

    def wait(self, timeout: Any = None) -> bool:
        self._work.wait()
        if self._buffer.dtype is torch.float64:
            mark = float(self._buffer.detach().view(-1)[-1])
            left_s = self._network.left_s(mark, self._way, self._posted_s)
            self._network.wait_until(left_s + self._latency_s)
        return True

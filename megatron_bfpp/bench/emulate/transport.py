"""isend and irecv on the emulated network, for this plugin, Megatron and torch.distributed.pipelining alike.

With one hardware queue a send and its receive end together. So the receiver answers each message with the time at which
it posted the receive, beside the real message.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ...integration.seams import changed
from .network import Network, Way

_ANSWER = 1  # added to the tag of a message


@contextmanager
def installed(network: Network) -> Iterator[None]:
    """Replace isend and irecv where they are looked up."""
    transport = _Transport(network)
    replaced = {name: getattr(transport, name) for name in ("isend", "irecv", "batch_isend_irecv")}
    with changed(dist, **replaced), changed(c10d, **replaced):  # P2POp compares with the names of c10d
        yield


class _Transport:
    def __init__(self, network: Network):
        real: Any = dist
        self._network, self._queue, self._world = network, network.queue, real.group.WORLD
        self._isend, self._irecv, self._batch = real.isend, real.irecv, real.batch_isend_irecv

    def isend(self, tensor: torch.Tensor, dst: int | None = None, group: Any = None, tag: int = 0, **more: Any) -> Any:
        group = group or self._world
        target = dist.get_global_rank(group, more["group_dst"]) if dst is None else dst
        way = self._begin(group, target)
        wire, posted = stamped(tensor, self._network.launch(target, way)), torch.zeros(2, dtype=torch.float64)
        return self._launched(group, target, way, wire, posted, tag, is_sent=True)

    def irecv(self, tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0, **more: Any) -> Any:
        group = group or self._world
        source = dist.get_global_rank(group, more["group_src"]) if src is None else src
        way = self._begin(group, source)
        latency_s = self._network.drawn(way.latency_s)
        posted = torch.tensor([self._network.stream_s, latency_s], dtype=torch.float64)
        return self._launched(group, source, way, tensor, posted, tag, is_sent=False)

    def batch_isend_irecv(self, operations: list[Any]) -> Any:
        with nullcontext() if self._queue is None else self._queue.batch(operations[0].group or self._world):
            return self._batch(operations)

    def _begin(self, group: Any, other: int) -> Way:
        if self._queue is not None:
            self._queue.begin((group, other))
        return self._network.way_to(other)

    def _launched(
        self, group: Any, other: int, way: Way, tensor: torch.Tensor, posted: torch.Tensor, tag: int, is_sent: bool
    ) -> Any:
        """Launch a message, and its answer where a queue needs it."""
        there, back = (self._isend, self._irecv) if is_sent else (self._irecv, self._isend)
        works = [there(tensor, other, group=group, tag=tag)]
        if self._queue is not None:
            works.append(back(posted, other, group=group, tag=tag + _ANSWER))
        message = _Message(self._network, works, tensor, posted, way, is_sent)
        if self._queue is not None:
            self._queue.launched((group, other), message.end_s)
        return message


class _Message(dist.Work):
    """A real message, with its answer, and the times of the emulated one.

    posted: when its receive was posted, and its latency; zeros at a sender that gets no answer.
    """

    def __init__(
        self, network: Network, works: list[Any], tensor: torch.Tensor, posted: torch.Tensor, way: Way, is_sent: bool
    ):
        super().__init__()
        self._network, self._works, self._tensor = network, works, tensor
        self._posted, self._way, self._is_sent = posted, way, is_sent

    def wait(self, timeout: Any = None) -> bool:
        self._network.wait_until(self._left_s if self._is_sent else self.end_s())
        return True

    def end_s(self) -> float:
        """Wait until the message is complete, and return when the emulated one has arrived."""
        return self._left_s + float(self._posted[1])

    @cached_property
    def _left_s(self) -> float:
        for work in self._works:
            work.wait()
        if self._tensor.dtype is not torch.float64:
            return 0.0
        return self._network.left_s(float(self._tensor.detach().view(-1)[-1]), self._way, float(self._posted[0]))


def stamped(tensor: torch.Tensor, mark: float) -> torch.Tensor:
    """Return a copy that ends with the mark of its message. Stages ignore that number; float64 holds a nanosecond."""
    if tensor.dtype is not torch.float64:  # a shape that is passed on, not a stage's tensor
        return tensor.detach()
    wire = tensor.detach().clone()
    wire.view(-1)[-1] = mark
    return wire

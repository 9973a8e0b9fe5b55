"""Point-to-point messages of one pipeline rank: receives posted ahead, sends asynchronous.

Decisions for GPUs, where this project cannot test, and their reasons:
  - Plain isend/irecv on process groups, which is what Megatron's P2PCommunicator does with --overlap-p2p-communication
    (its default). No batched calls: those make a send wait for an unrelated receive.
  - Every communicator carries one direction of one kind of message (activations forward, gradients backward) between
    two ranks: the in-order streams that schedule/check.py proves. There is a process group for each kind and each colour
    of the ring's edges (`schedule.lower.communicator`), 4 groups with an even number of ranks, 6 with an odd one. torch
    then has such a communicator in both of its modes: initialized lazily (Megatron's way), a group makes a communicator
    per pair of ranks; initialized eagerly (init_process_group with a device_id), all messages of a group share one and
    are serialized, which would put a receive that was posted ahead in the way of every later send. It also keeps the
    two neighbours apart that are one rank when there are 2 (Megatron uses the world's group for that).
  - The groups are made, and their communicators used once, in one fixed order before the first step. A communicator that
    is made lazily is a rendezvous of its own: isend does not return before the peer comes to its receive. In the order
    of first use that has hung Megatron (Megatron-LM PR 5240).
  - A sent tensor is kept beside its handle and given up SEND_WINDOW compute actions later. Megatron since 0.18 waits
    for a forward send before it frees the output (PR 4047), which puts the send in the way of the next forward;
    before 0.18 it does not wait, and the receiver may read freed memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..schedule.check import SEND_WINDOW
from ..schedule.ir import RECEIVES, SENDS, Action, Op, PipelineShape
from ..schedule.lower import Channel, channel, communicator, peer


class Route(NamedTuple):
    """Where the messages of one op of one stage go to or come from."""

    group: dist.ProcessGroup
    peer: int  # global rank


class ChannelGroups:
    """The process groups that carry the channels of one pipeline group."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        device: torch.device,
        timeout: timedelta | None = None,
        options: Any = None,
        new_group: Callable[..., dist.ProcessGroup] = dist.new_group,
    ):
        """Collective over `pp_group`. timeout, options: as new_group takes them; None for its defaults."""
        self.ranks = dist.get_process_group_ranks(pp_group)
        self.pp_rank = pp_group.rank()
        self._routes: dict[PipelineShape, dict[tuple[int, Op], Route]] = {}
        size = len(self.ranks)
        edges = [(edge, (edge + 1) % size) for edge in range(size)]
        channels: list[Channel] = [(Op.SEND_F, *edge) for edge in edges] + [(Op.SEND_B, *edge[::-1]) for edge in edges]
        # By communicator, of whose channels no two have a rank in common: the pairs of ranks connect side by side.
        channels.sort(key=lambda each: communicator(each, size))
        self._groups = {
            # Local synchronization: only the ranks of this pipeline take part, no matter what others do.
            key: new_group(
                self.ranks, timeout=timeout, backend=dist.get_backend(pp_group), pg_options=options,
                use_local_synchronization=True, group_desc="BFPP_{}_{}".format(*key),
            )
            for key in dict.fromkeys(communicator(each, size) for each in channels)
        }  # fmt: skip
        for each in channels:
            self._connect(each, device)

    def routes(self, shape: PipelineShape) -> dict[tuple[int, Op], Route]:
        """The route of each kind of message of each stage of this rank, by (stage, op)."""
        if shape not in self._routes:
            self._routes[shape] = dict(self._find_routes(shape))
        return self._routes[shape]

    def _find_routes(self, shape: PipelineShape) -> Iterator[tuple[tuple[int, Op], Route]]:
        for stage in shape.stages_on(self.pp_rank):
            for op in SENDS | RECEIVES:
                other = peer(Action(stage, op, 0), shape)
                if other is not None:
                    send = Action(stage, op, 0) if op in SENDS else other
                    key = communicator(channel(send, shape), shape.pp_size)
                    yield (stage, op), Route(self._groups[key], self.ranks[shape.rank_of(other.stage)])

    def _connect(self, key: Channel, device: torch.device) -> None:
        """Pass one number along a channel, so that its communicator exists before the first step."""
        _, source, target = key
        group = self._groups[communicator(key, len(self.ranks))]
        if self.pp_rank == source:
            dist.send(torch.zeros(1, device=device), self.ranks[target], group=group)
        elif self.pp_rank == target:
            dist.recv(torch.zeros(1, device=device), self.ranks[source], group=group)


@dataclass(slots=True)
class _Receive:
    """A posted receive. With variable shapes, first of the shape, then of the tensor."""

    action: Action
    handle: dist.Work
    buffer: torch.Tensor
    holds_shape: bool = False


class _Sent(NamedTuple):
    """A launched send, and what to do with the tensor once it may be reused."""

    action: Action
    handles: list[dist.Work]
    tensors: list[torch.Tensor]
    release: Callable[[], None] | None


@dataclass
class Messages:
    """The messages of one step of one rank. One object per step; `assert_finished` at its end."""

    groups: ChannelGroups
    shape: PipelineShape
    tensor_shape: tuple[int, ...]  # [sequence / cp (/ tp), microbatch, hidden]
    dtype: torch.dtype
    device: torch.device
    variable_shapes: bool = False  # each tensor is preceded by its three sizes
    waiting: Callable[[Action], AbstractContextManager[object]] | None = None  # around every wait; None costs nothing
    _receives: dict[Action, _Receive] = field(default_factory=dict)
    _unread_shapes: dict[dist.ProcessGroup, _Receive] = field(default_factory=dict)  # one at most per channel
    _postponed: dict[dist.ProcessGroup, deque[Action]] = field(default_factory=dict)
    _sent: deque[list[_Sent]] = field(default_factory=lambda: deque([[]]))

    def __post_init__(self) -> None:
        self._routes = self.groups.routes(self.shape)

    def post_receive(self, action: Action) -> None:
        """Launch the receive of RECV_F or RECV_B; `receive` waits for it."""
        route = self._routes[action.stage, action.op]
        if not self.variable_shapes:
            self._receives[action] = _irecv(action, route, self._empty(self.tensor_shape, action))
            return
        # A channel is in order: the tensor that follows an earlier shape must be asked for before the next shape. That one
        # may not be there yet, and nothing waits here: `receive`, which has to wait anyway, goes on with the channel.
        if route.group in self._unread_shapes:
            self._postponed.setdefault(route.group, deque()).append(action)
        else:
            self._post_shape(action, route)

    def receive(self, action: Action) -> torch.Tensor:
        """The tensor of an earlier `post_receive`, once it has arrived."""
        while self.variable_shapes and (action not in self._receives or self._receives[action].holds_shape):
            self._read_shape(self._routes[action.stage, action.op])
        received = self._receives.pop(action)
        self._wait(received.handle, action)
        return received.buffer

    def send(self, action: Action, tensor: torch.Tensor, release: Callable[[], None] | None = None) -> None:
        """Launch SEND_F or SEND_B. release is called once `tensor` may be reused."""
        group, target = self._routes[action.stage, action.op]
        tensors = [tensor.detach().contiguous()]
        if self.variable_shapes:
            tensors.insert(0, torch.tensor(tensor.shape, dtype=torch.int64, device=self.device))
        handles = [dist.isend(each, target, group=group) for each in tensors]
        self._sent[-1].append(_Sent(action, handles, tensors, release))

    def before_compute(self) -> None:
        """Give up what was sent SEND_WINDOW or more compute actions ago. To be called before each F and B."""
        while len(self._sent) >= SEND_WINDOW and self._may_wait_for(self._sent[0]):
            self._finish(self._sent.popleft())
        self._sent.append([])

    def finish_send(self, action: Action) -> None:
        """Give up the tensor of one send now, if that has not happened yet."""
        for sent in self._sent:
            for each in [each for each in sent if each.action == action]:
                sent.remove(each)
                self._finish([each])

    def assert_finished(self) -> None:
        """Wait for the last sends; nothing may be left over."""
        while self._sent:
            self._finish(self._sent.popleft())
        assert not self._receives, f"received but never used: {', '.join(map(str, self._receives))}"

    def _finish(self, sent: list[_Sent]) -> None:
        for each in sent:
            for handle in each.handles:
                self._wait(handle, each.action)
            if each.release is not None:
                each.release()

    def _wait(self, handle: dist.Work, action: Action) -> None:
        if self.waiting is None:
            handle.wait()
        else:
            with self.waiting(action):
                handle.wait()

    def _may_wait_for(self, sent: list[_Sent]) -> bool:
        """With variable shapes a tensor is asked for only when its shape is read, by a peer that may have to wait for this
        rank's next action before: waiting for such a send can deadlock, so it is given up when it has completed.
        """
        return not self.variable_shapes or all(handle.is_completed() for each in sent for handle in each.handles)

    def _post_shape(self, action: Action, route: Route) -> None:
        header = _irecv(action, route, torch.empty(3, dtype=torch.int64, device=self.device))
        header.holds_shape = True
        self._receives[action] = self._unread_shapes[route.group] = header

    def _read_shape(self, route: Route) -> None:
        """Wait for the shape that a channel has asked for last; then ask for its tensor, and for the next shape."""
        header = self._unread_shapes.pop(route.group)
        self._wait(header.handle, header.action)
        buffer = self._empty(tuple(header.buffer.tolist()), header.action)
        self._receives[header.action] = _irecv(header.action, route, buffer)
        if self._postponed.get(route.group):
            self._post_shape(self._postponed[route.group].popleft(), route)

    def _empty(self, shape: tuple[int, ...], action: Action) -> torch.Tensor:
        # A stage's input is a leaf of its graph: backward_step reads the gradient to send back from it.
        return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=action.op is Op.RECV_F)


def _irecv(action: Action, route: Route, buffer: torch.Tensor) -> _Receive:
    return _Receive(action, dist.irecv(buffer, route.peer, group=route.group), buffer)

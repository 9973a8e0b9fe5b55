"""Point-to-point messages of one pipeline rank: receives posted ahead, sends asynchronous.

Decisions for GPUs, where this project cannot test, and their reasons:
  - Plain isend/irecv on process groups, which is what Megatron's P2PCommunicator does with --overlap-p2p-communication
    (its default). No batched calls: those make a send wait for an unrelated receive.
  - One process group per kind of message (activations forward, gradients backward). torch gives each pair of ranks of
    an NCCL group a communicator and a stream of its own, so each carries one kind of message in one direction: the
    channels that schedule/check.py proves. With 2 ranks both neighbours are one rank, and the two directions of a kind
    get a group each (Megatron uses the world group for that, which other traffic shares).
  - The groups are made, and their communicators used once, in one fixed order before the first step. Communicators that
    NCCL creates lazily, in the order of first use, have hung Megatron (Megatron-LM PR 5240).
  - A sent tensor is kept beside its handle and given up SEND_WINDOW compute actions later. Megatron since 0.18 waits
    for a forward send before it frees the output (PR 4047), which puts the send in the way of the next forward;
    before 0.18 it does not wait, and the receiver may read freed memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from ..schedule.check import SEND_WINDOW
from ..schedule.ir import Action, Op, PipelineShape
from ..schedule.lower import Channel, channel, peer

_KINDS = (Op.SEND_F, Op.SEND_B)


class ChannelGroups:
    """The process groups that carry the channels of one pipeline group."""

    def __init__(self, pp_group: dist.ProcessGroup, device: torch.device, timeout: timedelta | None = None):
        """Collective over `pp_group`. timeout: as torch.distributed.new_group takes it; None for its default."""
        self.ranks = dist.get_process_group_ranks(pp_group)
        self.pp_rank = pp_group.rank()
        directions = 2 if len(self.ranks) == 2 else 1
        backend = dist.get_backend(pp_group)
        self._groups = {
            (kind, direction): dist.new_group(
                # Local synchronization: only the ranks of this pipeline take part, no matter what others do.
                self.ranks, timeout=timeout, backend=backend, use_local_synchronization=True,
                group_desc=f"BFPP_{kind}_{direction}",
            )
            for kind in _KINDS
            for direction in range(directions)
        }  # fmt: skip
        self._connect(device)

    def group(self, key: Channel) -> dist.ProcessGroup:
        kind, source, _ = key
        return self._groups[kind, source % 2 if len(self.ranks) == 2 else 0]

    def _connect(self, device: torch.device) -> None:
        """Pass one number along every channel, so that each communicator exists before the first step.

        Even ranks send first, odd ranks receive first: no cycle, also around a ring of odd length, because rank 0
        receives only after rank 1, which receives first, has taken what it sent.
        """
        size = len(self.ranks)
        for kind, step in ((Op.SEND_F, 1), (Op.SEND_B, -1)):
            outgoing: Channel = kind, self.pp_rank, (self.pp_rank + step) % size
            incoming: Channel = kind, (self.pp_rank - step) % size, self.pp_rank

            def send(key: Channel = outgoing) -> None:
                dist.send(torch.zeros(1, device=device), self.ranks[key[2]], group=self.group(key))

            def receive(key: Channel = incoming) -> None:
                dist.recv(torch.zeros(1, device=device), self.ranks[key[1]], group=self.group(key))

            for operation in (send, receive) if self.pp_rank % 2 == 0 else (receive, send):
                operation()


@dataclass
class _Receive:
    """A posted receive. With variable shapes, first of the shape, then of the tensor."""

    action: Action
    handle: dist.Work
    buffer: torch.Tensor
    holds_shape: bool = False


@dataclass
class _Sent:
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
    _receives: dict[Action, _Receive] = field(default_factory=dict)
    _unread_shapes: dict[Channel, _Receive] = field(default_factory=dict)
    _sent: deque[list[_Sent]] = field(default_factory=lambda: deque([[]]))

    def post_receive(self, action: Action) -> None:
        """Launch the receive of RECV_F or RECV_B; `receive` waits for it."""
        send = peer(action, self.shape)
        assert send is not None, f"{action} has no sender"
        key = channel(send, self.shape)
        if not self.variable_shapes:
            self._receives[action] = self._irecv(action, key, self._empty(self.tensor_shape, action))
            return
        # A channel is in order: the tensor that follows an earlier shape must be asked for before the next shape.
        self._read_shape(key)
        header = self._irecv(action, key, torch.empty(3, dtype=torch.int64, device=self.device))
        header.holds_shape = True
        self._receives[action] = self._unread_shapes[key] = header

    def receive(self, action: Action) -> torch.Tensor:
        """The tensor of an earlier `post_receive`, once it has arrived."""
        if self._receives[action].holds_shape:
            send = peer(action, self.shape)
            assert send is not None, f"{action} has no sender"
            self._read_shape(channel(send, self.shape))
        received = self._receives.pop(action)
        received.handle.wait()
        return received.buffer

    def send(self, action: Action, tensor: torch.Tensor, release: Callable[[], None] | None = None) -> None:
        """Launch SEND_F or SEND_B. release is called once `tensor` may be reused."""
        key = channel(action, self.shape)
        group, target = self.groups.group(key), self.groups.ranks[key[2]]
        tensors = [tensor.detach().contiguous()]
        if self.variable_shapes:
            tensors.insert(0, torch.tensor(tensor.shape, dtype=torch.int64, device=self.device))
        handles = [dist.isend(each, target, group=group) for each in tensors]
        self._sent[-1].append(_Sent(action, handles, tensors, release))

    def before_compute(self) -> None:
        """Give up what was sent SEND_WINDOW or more compute actions ago. To be called before each F and B."""
        while len(self._sent) >= SEND_WINDOW:
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

    def _irecv(self, action: Action, key: Channel, buffer: torch.Tensor) -> _Receive:
        return _Receive(action, dist.irecv(buffer, self.groups.ranks[key[1]], group=self.groups.group(key)), buffer)

    def _read_shape(self, key: Channel) -> None:
        header = self._unread_shapes.pop(key, None)
        if header is not None:
            header.handle.wait()
            buffer = self._empty(tuple(header.buffer.tolist()), header.action)
            self._receives[header.action] = self._irecv(header.action, key, buffer)

    def _empty(self, shape: tuple[int, ...], action: Action) -> torch.Tensor:
        # A stage's input is a leaf of its graph: backward_step reads the gradient to send back from it.
        return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=action.op is Op.RECV_F)

    @staticmethod
    def _finish(sent: list[_Sent]) -> None:
        for each in sent:
            for handle in each.handles:
                handle.wait()
            if each.release is not None:
                each.release()

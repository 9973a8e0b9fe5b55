"""Sends and receives the messages of one pipeline rank. Receives are posted ahead, sends are asynchronous.

The groups that carry them are made by channels.py. Decisions for GPUs, where this project cannot test, with reasons:
  - Messages are plain isend/irecv on process groups, as in Megatron's P2PCommunicator with its default
    --overlap-p2p-communication. Batched calls would make a send wait for an unrelated receive.
  - A sent tensor is kept beside its handle and given up SEND_WINDOW compute actions later. Megatron since 0.18 waits
    for a forward send before it frees the output (PR 4047), which delays the next forward; before 0.18 it does not
    wait, and the receiver may read freed memory.
  - Headers go from host to host over a group of gloo: no channel holds one, and nothing waits for the device. A tensor
    of a known shape is asked for at once, and its header is compared when the tensor is waited for. With variable
    shapes the host waits for the header where the receive is posted. `schedule.lower` has put that where
    every such wait points back in time; posted ahead as usual, two ranks would wait for each other's next sends.
"""

import re
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ..schedule.ir import SEND_WINDOW, SENDS, Action, Op, PipelineShape, peer
from ..schedule.simulate import Key
from . import headers
from .activity import Activity
from .channels import ChannelGroups


class PeerLostError(RuntimeError):
    """A message could not be sent or received because of the other rank; this rank is not at fault."""


class MessageMismatchError(RuntimeError):
    """The header of a message says that it is not the one this rank waits for."""


class _Received(NamedTuple):
    """A posted receive. header: still to be compared."""

    action: Action
    handle: dist.Work | None
    buffer: torch.Tensor
    header: headers.OnTheWay | None = None


class _Sent(NamedTuple):
    """A launched send. release is called with `tensor` once it may be reused."""

    action: Action
    handle: dist.Work | None
    sent: torch.Tensor  # what the handle sends: the tensor or a contiguous copy of it
    tensor: torch.Tensor
    release: Callable[[torch.Tensor], None] | None
    header: headers.OnTheWay | None = None


@dataclass
class Messages:
    """The messages of one step of one rank. Make one object per step; call `assert_finished` last."""

    groups: ChannelGroups
    shape: PipelineShape
    tensor_shape: tuple[int, ...]  # [sequence / cp (/ tp), microbatch, hidden]
    dtype: torch.dtype
    device: torch.device
    header_group: dist.ProcessGroup | None = None  # of gloo: each tensor has a header there, which is compared
    variable_shapes: bool = False  # a tensor has the sizes of its header, if there are headers
    activity: Activity = field(default_factory=Activity)  # the watchdog reads it
    waiting: Callable[[Action], AbstractContextManager[object]] | None = None  # around every wait; None costs nothing
    _receives: dict[Key, _Received] = field(default_factory=dict)
    _sent: deque[list[_Sent]] = field(default_factory=lambda: deque([[]]))

    def __post_init__(self) -> None:
        self._routes = self.groups.routes(self.shape)
        self._is_cuda = self.device.type == "cuda"

    def post_receive(self, action: Action) -> None:
        """Launch the receive of RECV_F or RECV_B; `receive` waits for it."""
        group, source = self._routes[action.stage, action.op]
        sizes, header = self.tensor_shape, None
        if self.header_group is not None:
            header = self._launch(action, headers.receive, action.op, source, self.header_group)
            if self.variable_shapes:
                sizes, header = self._compared(header, action), None
        # A stage's input is a leaf of its graph; backward_step reads from it the gradient to send back.
        buffer = torch.empty(sizes, dtype=self.dtype, device=self.device, requires_grad=action.op is Op.RECV_F)
        handle = self._launch(action, dist.irecv, buffer, source, group)
        self._receives[action] = _Received(action, handle, buffer, header)

    def receive(self, action: Key) -> torch.Tensor:
        """Wait for the tensor of an earlier `post_receive` and return it. action: it, or a tuple that equals it."""
        received = self._receives.pop(action)
        if received.header is not None:
            self._compared(received.header, received.action)
        self._wait(received.handle, received.action)
        if self._is_cuda:
            # wait() only made the compute stream wait. An event behind that wait tells when the message has arrived.
            # The handle must not be kept for it: a NCCL handle holds its tensors, which would live to the step's end.
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.activity.launched(received.action, event)
        return received.buffer

    def send(self, action: Action, tensor: torch.Tensor, release: Callable[[torch.Tensor], None] | None = None) -> None:
        """Launch SEND_F or SEND_B. release is called with `tensor` once it may be reused, within the step."""
        group, target = self._routes[action.stage, action.op]
        sent, header = tensor.contiguous(), None
        if self.header_group is not None:
            header = self._launch(action, headers.send, action, tensor, target, self.header_group)
        handle = self._launch(action, dist.isend, sent, target, group)
        self._sent[-1].append(_Sent(action, handle, sent, tensor, release, header))

    def before_compute(self) -> None:
        """Give up the tensors sent SEND_WINDOW or more compute actions ago. Call it before each F and B."""
        while len(self._sent) >= SEND_WINDOW:
            self._finish(self._sent.popleft())
        self._sent.append([])

    def finish_send(self, action: Key) -> None:
        """Give up the tensor of one send now, if that has not happened yet."""
        for window in self._sent:
            for place, each in enumerate(window):
                if each.action == action:
                    del window[place]
                    self._finish([each])
                    return

    def assert_finished(self) -> None:
        """Wait for the last sends; AssertionError if a message was received and never used."""
        while self._sent:
            self._finish(self._sent.popleft())
        assert not self._receives, f"received but never used: {', '.join(map(str, self._receives))}"

    def _finish(self, sent: list[_Sent]) -> None:
        for each in sent:
            if each.header is not None:
                self._wait(each.header.handle, each.action)
            self._wait(each.handle, each.action)
            if each.release is not None:
                each.release(each.tensor)

    def _launch[**P, T](self, action: Action, launch: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return launch(*args, **kwargs)
        except RuntimeError as error:
            self._lost(action, error)

    def _wait(self, handle: dist.Work | None, action: Action) -> None:
        assert handle is not None, "this rank takes part in its own messages"
        activity = self.activity
        activity.wait(action)
        try:
            if self.waiting is None:
                handle.wait()
            else:
                with self.waiting(action):
                    handle.wait()
        except RuntimeError as error:
            self._lost(action, error)
        activity.waiting = None

    def _lost(self, action: Action, error: RuntimeError) -> NoReturn:
        verb = "sent to" if action.op in SENDS else "received from"
        # gloo begins with its source line and ends with advice: "[.../pair.cc:561] Connection closed by peer [...].
        # This is ..."
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().splitlines()[0]).split(". This is")[0]
        raise PeerLostError(f"{action} could not be {verb} {self._other(action)}: {reason}") from error

    def _other(self, action: Action) -> str:
        other = peer(action, self.shape)
        assert other is not None, "a message has two ends"
        pp_rank = self.shape.rank_of(other.stage)
        return f"pp_rank {pp_rank} (rank {self.groups.ranks[pp_rank]})"

    def _compared(self, header: headers.OnTheWay, action: Action) -> tuple[int, ...]:
        """Wait for the header of a receive; return the sizes of its tensor. MessageMismatchError for another message.

        The header was sent by the host of the sender just before the tensor, so this waits for no device.
        """
        self._wait(header.handle, action)
        expected = peer(action, self.shape)
        assert expected is not None, "a message has two ends"
        found = headers.read(header.numbers)
        sizes = found.sizes if self.variable_shapes else tuple(self.tensor_shape)
        wanted = headers.Header(expected, self.dtype, sizes)
        if found != wanted:
            raise MessageMismatchError(
                f"pp_rank {self.groups.pp_rank} waits for {wanted} ({action} here), "
                f"but {self._other(action)} has sent {found}"
            )
        return sizes

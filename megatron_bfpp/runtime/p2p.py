"""Sends and receives the messages of one pipeline rank. Receives are posted ahead, sends are asynchronous.

The groups that carry them are made by channels.py. Decisions for GPUs, where this project cannot test, with reasons:
  - Messages are plain isend/irecv on process groups, as in Megatron's P2PCommunicator with its default
    --overlap-p2p-communication. Batched calls would make a send wait for an unrelated receive.
  - A sent tensor is kept beside its handle and given up SEND_WINDOW compute actions later. Megatron since 0.18 waits
    for a forward send before it frees the output (PR 4047), which delays the next forward; before 0.18 it does not
    wait, and the receiver may read freed memory.
"""

import re
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ..schedule.check import SEND_WINDOW
from ..schedule.ir import RECEIVES, SENDS, Action, Op, PipelineShape
from ..schedule.lower import peer
from ..schedule.simulate import Key
from . import headers
from .activity import Activity
from .channels import ChannelGroups, Route


class PeerLostError(RuntimeError):
    """A message could not be sent or received because of the other rank; this rank is not at fault."""


class MessageMismatchError(RuntimeError):
    """Under --bfpp-debug-p2p a message arrived that is not the one this rank waits for."""


@dataclass(slots=True)
class _Receive:
    """A posted receive: of a tensor, or of the header that precedes it."""

    action: Action
    handle: dist.Work | None
    buffer: torch.Tensor
    is_header: bool = False


class _Sent(NamedTuple):
    """A launched send. release is called with `tensor` once it may be reused."""

    action: Action
    handles: list[dist.Work | None]
    sent: list[torch.Tensor]  # what the handles send: a header, and the tensor or a contiguous copy of it
    tensor: torch.Tensor
    release: Callable[[torch.Tensor], None] | None


@dataclass
class Messages:
    """The messages of one step of one rank. Make one object per step; call `assert_finished` last."""

    groups: ChannelGroups
    shape: PipelineShape
    tensor_shape: tuple[int, ...]  # [sequence / cp (/ tp), microbatch, hidden]
    dtype: torch.dtype
    device: torch.device
    variable_shapes: bool = False  # each tensor is preceded by its three sizes
    debug: bool = False  # each tensor is preceded by a header of headers.py, which is compared
    activity: Activity = field(default_factory=Activity)  # the watchdog reads it
    waiting: Callable[[Action], AbstractContextManager[object]] | None = None  # around every wait; None costs nothing
    _receives: dict[Key, _Receive] = field(default_factory=dict)
    _unread: dict[dist.ProcessGroup, _Receive] = field(default_factory=dict)  # headers, one at most per channel
    _postponed: dict[dist.ProcessGroup, deque[Action]] = field(default_factory=dict)
    _sent: deque[list[_Sent]] = field(default_factory=lambda: deque([[]]))

    def __post_init__(self) -> None:
        self._routes = self.groups.routes(self.shape)
        self._has_headers = self.variable_shapes or self.debug
        self._is_cuda = self.device.type == "cuda"

    def post_receive(self, action: Action) -> None:
        """Launch the receive of RECV_F or RECV_B; `receive` waits for it."""
        route = self._routes[action.stage, action.op]
        if not self._has_headers:
            self._receives[action] = self._irecv(action, route, self._empty(self.tensor_shape, action))
            return
        # A channel is in order: the tensor of an earlier header must be received before the next header. That header
        # may not have arrived, and nothing waits here; `receive`, which has to wait anyway, continues the channel.
        if route.group in self._unread:
            self._postponed.setdefault(route.group, deque()).append(action)
        else:
            self._post_header(action, route)

    def receive(self, action: Key) -> torch.Tensor:
        """Wait for the tensor of an earlier `post_receive` and return it. action: it, or a tuple that equals it."""
        while self._has_headers and (action not in self._receives or self._receives[action].is_header):
            self._read_header(self._routes[action[0], action[1]])
        received = self._receives.pop(action)
        self._wait(received.handle, received.action)
        return received.buffer

    def send(self, action: Action, tensor: torch.Tensor, release: Callable[[torch.Tensor], None] | None = None) -> None:
        """Launch SEND_F or SEND_B. release is called with `tensor` once it may be reused, within the step."""
        group, target = self._routes[action.stage, action.op]
        sent = [tensor.contiguous()]
        if self.debug:
            sent.insert(0, headers.write(action, tensor, self.device))
        elif self.variable_shapes:
            sent.insert(0, torch.tensor(tensor.shape, dtype=torch.int64, device=self.device))
        try:
            handles = [dist.isend(each, target, group=group) for each in sent]
        except RuntimeError as error:
            self._lost(action, error)
        self._sent[-1].append(_Sent(action, handles, sent, tensor, release))

    def before_compute(self) -> None:
        """Give up the tensors sent SEND_WINDOW or more compute actions ago. Call it before each F and B."""
        while len(self._sent) >= SEND_WINDOW and self._may_wait_for(self._sent[0]):
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
            for handle in each.handles:
                self._wait(handle, each.action)
            if each.release is not None:
                each.release(each.tensor)

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
        if self._is_cuda and action.op in RECEIVES:
            # wait() only made the compute stream wait. An event behind that wait tells when the message has arrived.
            # The handle must not be kept for it: a NCCL handle holds its tensors, which would live to the step's end.
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            activity.launched(action, event)

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

    def _may_wait_for(self, sent: list[_Sent]) -> bool:
        """Return whether waiting for these sends is safe.

        With headers the peer posts a tensor's receive only when it has read the header, and before that it may wait for
        this rank's next action. Waiting for such a send can deadlock: it is given up once it has completed.
        """
        handles = (handle for each in sent for handle in each.handles)
        return not self._has_headers or all(handle is None or handle.is_completed() for handle in handles)

    def _post_header(self, action: Action, route: Route) -> None:
        size = headers.SIZE if self.debug else 3
        header = self._irecv(action, route, torch.empty(size, dtype=torch.int64, device=self.device))
        header.is_header = True
        self._receives[action] = self._unread[route.group] = header

    def _read_header(self, route: Route) -> None:
        """Wait for the last header of a channel; then post the receives of its tensor and of the next header."""
        header = self._unread.pop(route.group)
        self._wait(header.handle, header.action)
        sizes = self._compared(header) if self.debug else tuple(header.buffer.tolist())
        self._receives[header.action] = self._irecv(header.action, route, self._empty(sizes, header.action))
        if self._postponed.get(route.group):
            self._post_header(self._postponed[route.group].popleft(), route)

    def _compared(self, received: _Receive) -> tuple[int, ...]:
        """Return the sizes of the tensor that follows; MessageMismatchError unless it is the expected one."""
        expected = peer(received.action, self.shape)
        assert expected is not None, "a message has two ends"
        found = headers.read(received.buffer)
        sizes = found.sizes if self.variable_shapes else tuple(self.tensor_shape)
        wanted = headers.Header(expected, self.dtype, sizes)
        if found != wanted:
            raise MessageMismatchError(
                f"pp_rank {self.groups.pp_rank} waits for {wanted} ({received.action} here), "
                f"but {self._other(received.action)} has sent {found}"
            )
        return sizes

    def _empty(self, shape: tuple[int, ...], action: Action) -> torch.Tensor:
        # A stage's input is a leaf of its graph; backward_step reads from it the gradient to send back.
        return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=action.op is Op.RECV_F)

    def _irecv(self, action: Action, route: Route, buffer: torch.Tensor) -> _Receive:
        try:
            return _Receive(action, dist.irecv(buffer, route.peer, group=route.group), buffer)
        except RuntimeError as error:
            self._lost(action, error)

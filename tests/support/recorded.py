"""Record what the hosts of a pipeline launch, as programmes of cuda_rules.py: what is proved is then what runs.

One process plays one rank after the other on torch's fake process group, which sends nothing. What runs is the real
code: runtime.executor, p2p, channels and data_parallel. Only the computation is a stand-in, and isend, irecv and the
wait of their handles note what ProcessGroupNCCL launches:
  - isend, irecv: a command on the communicator's stream, behind all that the compute stream holds at that moment;
  - wait(): the compute stream waits for the end of that command; the host waits for nothing.
Headers, which gloo carries under a tag, are messages from host to host: their wait stops the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cuda_rules import Command, End, HostMessage, HostWait, Programme
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bfpp.runtime import headers
from megatron_bfpp.runtime.channels import ChannelGroups
from megatron_bfpp.runtime.data_parallel import DataParallel
from megatron_bfpp.runtime.executor import Executor
from megatron_bfpp.runtime.p2p import Messages
from megatron_bfpp.schedule import Action, PipelineShape
from megatron_bfpp.schedule.costs import UNIT, Costs
from megatron_bfpp.schedule.ir import Schedule, peer

COMPUTE, DATA = "compute", "data-parallel collectives"


@dataclass
class Recorder:
    """What one rank launches, in order."""

    pp_rank: int
    shape: PipelineShape | None = None  # of a plan's actions; None: no action is known, as in Megatron's loop
    per_pair: bool = True  # a communicator per pair of ranks, made lazily; False: per group, with a device_id
    programme: Programme = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # the place at which each action begins
    doing: Action | None = None
    _last: tuple[Command, ...] = ()  # of the compute stream

    def compute(self, name: str, duration: float = 0.0, after: Sequence[Command] = ()) -> None:
        """Launch a kernel, or a wait for `after`, on the compute stream."""
        self._last = (Command(name, COMPUTE, duration, after),)
        self.programme += self._last

    def beside(self, name: str, stream: Any, duration: float = 0.0, end: End | None = None) -> Command:
        """Launch something on another stream, behind what the compute stream holds."""
        command = Command(name, stream, duration, self._last, end)
        self.programme.append(command)
        return command

    def message(self, group: dist.ProcessGroup, other: int, is_send: bool) -> Command:
        """Launch a send to the global rank `other`, or a receive from it."""
        pair = tuple(sorted((self.pp_rank, other)))
        name, content = f"a {'send to' if is_send else 'receive from'} {other}", None
        if self.doing is not None and self.shape is not None:
            name, content = str(self.doing), self.doing if is_send else peer(self.doing, self.shape)
        stream = (group.group_desc, pair) if self.per_pair else group.group_desc
        return self.beside(name, stream, end=End(group.group_desc, other, is_send, content))

    def header(self, numbers: torch.Tensor, other: int, tag: int, is_send: bool) -> Any:
        """Send a header to the global rank `other`, or begin to receive one from it."""
        assert self.doing is not None and self.shape is not None, "an action runs"
        send = self.doing if is_send else peer(self.doing, self.shape)
        message = HostMessage(f"the header of {self.doing}", End(("gloo", tag), other, is_send, send))
        self.programme.append(message)
        return HeaderHandle(message, numbers, self)

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Note where an action begins."""
        self.begins.append(len(self.programme))
        self.doing = action
        yield


@dataclass
class Handle:
    """What isend and irecv return."""

    work: dist.Work
    command: Command
    recorder: Recorder

    def wait(self) -> bool:
        self.recorder.compute(f"the wait for {self.command.name}", after=(self.command,))
        return self.work.wait()

    def is_completed(self) -> bool:
        return False  # the host runs ahead of the device


@dataclass
class HeaderHandle:
    """What isend and irecv of a header return."""

    message: HostMessage
    numbers: torch.Tensor
    recorder: Recorder

    def wait(self) -> None:
        self.recorder.programme.append(HostWait(self.message))
        if not self.message.end.is_send:
            self.numbers.copy_(headers.write(self.message.end.content, torch.empty(1)))


@contextmanager
def fake_pipeline(recorder: Recorder, size: int) -> Iterator[dist.ProcessGroup]:
    """Be one rank of a pipeline of `size` ranks, which is torch's world, and record its messages."""
    isend, irecv = dist.isend, dist.irecv

    def record_send(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup, tag: int | None = None) -> Any:
        if tag is not None:
            return recorder.header(tensor, dst, tag, True)
        return Handle(isend(tensor, dst, group), recorder.message(group, dst, True), recorder)

    def record_receive(tensor: torch.Tensor, src: int, group: dist.ProcessGroup, tag: int | None = None) -> Any:
        if tag is not None:
            return recorder.header(tensor, src, tag, False)
        return Handle(irecv(tensor, src, group), recorder.message(group, src, False), recorder)

    dist.init_process_group("fake", store=FakeStore(), rank=recorder.pp_rank, world_size=size)
    try:
        with patch.object(dist, "isend", record_send), patch.object(dist, "irecv", record_receive):
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Compute:
    """Launches a kernel for each forward and backward, and a collective for each gather and reduction."""

    def __init__(self, recorder: Recorder, costs: Costs):
        self.recorder, self.costs = recorder, costs
        self.gathered: dict[int, Command] = {}  # chunk -> the gather that its next forward waits for

    def forward(self, chunk: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        gather = self.gathered.pop(chunk, None)
        if gather is not None:
            self.recorder.compute(f"the wait for {gather.name}", after=(gather,))
        self._launch()
        return torch.zeros(1)

    def backward(
        self, received: torch.Tensor | None, output: torch.Tensor, grad: torch.Tensor | None
    ) -> torch.Tensor | None:
        self._launch()
        return None if received is None else torch.zeros(1)

    def input_gradient(
        self, chunk: int, microbatch: int, received: torch.Tensor | None, output: torch.Tensor,
        grad: torch.Tensor | None,
    ) -> torch.Tensor | None:  # fmt: skip
        return self.backward(received, output, grad)

    def weight_gradients(self, chunk: int, microbatch: int) -> None:
        self._launch()

    def release(self, output: torch.Tensor) -> None:
        pass

    def gather(self, chunk: int) -> None:
        self.gathered[chunk] = self.recorder.beside(str(self.recorder.doing), DATA, self.costs.gather)

    def reduce(self, chunk: int) -> None:
        self.recorder.beside(str(self.recorder.doing), DATA, self.costs.reduction)

    def _launch(self) -> None:
        action = self.recorder.doing
        assert action is not None, "an action runs"
        self.recorder.compute(str(action), self.costs.of(action))


def record(
    plan: Schedule,
    shape: PipelineShape,
    costs: Costs = UNIT,
    forward_only: bool = False,
    per_pair: bool = True,
    with_headers: bool = False,
    variable_shapes: bool = False,
) -> list[Recorder]:
    """Run the executor of each rank of a plan; return what each launched. costs: of what is no message."""
    return [
        _record(Recorder(rank, shape, per_pair), actions, shape, costs, forward_only, with_headers, variable_shapes)
        for rank, actions in enumerate(plan)
    ]


def _record(
    recorder: Recorder,
    actions: list[Action],
    shape: PipelineShape,
    costs: Costs,
    forward_only: bool,
    with_headers: bool,
    variable_shapes: bool,
) -> Recorder:
    compute = Compute(recorder, costs)

    def of_each_chunk(launch: Callable[[int], None]) -> list[Callable[[Any], None]]:
        return [lambda parameters, chunk=chunk: launch(chunk) for chunk in range(shape.num_chunks)]

    model = [torch.nn.Identity()] * shape.num_chunks
    with (
        fake_pipeline(recorder, shape.pp_size) as world,
        DataParallel(None, of_each_chunk(compute.reduce), of_each_chunk(compute.gather), model) as data_parallel,
    ):
        cpu = torch.device("cpu")
        groups = ChannelGroups(world, cpu, dist.new_group)
        gloo = world if with_headers else None
        messages = Messages(groups, shape, (1,), torch.float32, cpu, gloo, variable_shapes)
        Executor(shape, compute, messages, data_parallel, forward_only, recorder.span).run(actions)
    return recorder


def programmes(recorders: list[Recorder]) -> list[Programme]:
    return [each.programme for each in recorders]

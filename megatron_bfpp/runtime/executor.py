"""Runs the plan of one rank: one handler per kind of action. The handlers alone define what an action does."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..schedule.ir import Action, Op, PipelineShape
from .activity import Activity
from .data_parallel import DataParallel
from .fully_sharded import FullySharded
from .p2p import Messages

Tensor = torch.Tensor


class Compute(Protocol):
    """The model's framework: it computes the forwards and backwards."""

    def forward(self, chunk: int, microbatch: int, received: Tensor | None) -> Tensor:
        """Return the output of a chunk, or the loss on the last stage. received: None on the first stage."""

    def backward(self, received: Tensor | None, output: Tensor, grad: Tensor | None) -> Tensor | None:
        """Return the gradient of `received`. grad: of `output`; None on the last stage, whose output is the loss."""

    def input_gradient(
        self, chunk: int, microbatch: int, received: Tensor | None, output: Tensor, grad: Tensor | None
    ) -> Tensor | None:
        """Return the gradient of `received`, as `backward` does, and leave those of weights to `weight_gradients`."""

    def weight_gradients(self, chunk: int, microbatch: int) -> None:
        """Compute what the `input_gradient` of this chunk and microbatch has left over."""

    def release(self, output: Tensor) -> None:
        """Free the data of a sent output; its graph stays."""


@dataclass
class Executor:
    """Executes one step of one rank. Make one object per step."""

    shape: PipelineShape
    compute: Compute
    messages: Messages
    data_parallel: DataParallel | FullySharded
    forward_only: bool = False
    span: Callable[[Action], AbstractContextManager[object]] | None = None  # around every action; None costs nothing
    activity: Activity = field(default_factory=Activity)  # the watchdog reads it
    _inputs: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)  # (stage, microbatch) ->
    _outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _input_grads: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last_stage = self.shape.num_stages - 1

    def run(self, actions: list[Action]) -> None:
        """Run `actions` in order. An error in one of them carries a note that names it."""
        handlers: dict[Op, Callable[[Action], None]] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._input_gradient,
            Op.W: self._weight_gradients,
            Op.SEND_F: self._send_forward,
            Op.SEND_B: self._send_backward,
            Op.RECV_F: self.messages.post_receive,
            Op.RECV_B: self.messages.post_receive,
            Op.UNSHARD: self._unshard,
            Op.RESHARD: self._reshard,
            Op.REDUCE_GRAD: self._reduce_grad,
        }
        span, activity, clock = self.span, self.activity, time.monotonic
        try:
            for action in actions:
                activity.doing, activity.since = action, clock()  # `begin` without its call: no wait is left
                if span is None:
                    handlers[action.op](action)
                else:
                    with span(action):
                        handlers[action.op](action)
        except Exception as error:
            activity.fail()
            error.add_note(f"megatron_bfpp: pp_rank {self.shape.rank_of(action.stage)} was running {action}")
            raise
        activity.begin("the end of the step")
        self.messages.assert_finished()
        assert not self._inputs and not self._outputs and not self._input_grads, "a tensor was never used"

    def _forward(self, action: Action) -> None:
        self.messages.before_compute()
        stage, _, microbatch = action
        assert microbatch is not None, "a forward has a microbatch"
        # Plain tuples equal the actions of the plan and are made in a tenth of the time.
        received = self.messages.receive((stage, Op.RECV_F, microbatch)) if stage > 0 else None
        output = self.compute.forward(self.shape.chunk_of(stage), microbatch, received)
        if not self.forward_only:
            self._inputs[stage, microbatch] = received
        if not (self.forward_only and stage == self._last_stage):
            self._outputs[stage, microbatch] = output

    def _backward(self, action: Action) -> None:
        grad = self._gradient_of_output(action)
        stage, _, microbatch = action
        assert microbatch is not None, "a backward has a microbatch"
        self._before_last(action)
        key = stage, microbatch
        self._keep(action, self.compute.backward(self._inputs.pop(key), self._outputs.pop(key), grad))

    def _input_gradient(self, action: Action) -> None:
        grad = self._gradient_of_output(action)
        stage, _, microbatch = action
        assert microbatch is not None, "an I has a microbatch"
        key, chunk = (stage, microbatch), self.shape.chunk_of(stage)
        received, output = self._inputs.pop(key), self._outputs.pop(key)
        self._keep(action, self.compute.input_gradient(chunk, microbatch, received, output, grad))

    def _weight_gradients(self, action: Action) -> None:
        assert action.microbatch is not None, "a W has a microbatch"
        self._before_last(action)
        self.compute.weight_gradients(self.shape.chunk_of(action.stage), action.microbatch)

    def _gradient_of_output(self, action: Action) -> Tensor | None:
        """Wait for the gradient of a stage's output; None on the last stage."""
        self.messages.before_compute()
        stage, _, microbatch = action
        if stage == self._last_stage:
            return None
        assert microbatch is not None, "a backward has a microbatch"
        grad = self.messages.receive((stage, Op.RECV_B, microbatch))
        # The gradient could only be computed from the output, so the output has arrived and this does not wait.
        # Megatron's backward expects a freed output, and a short plan can come here within the send's window.
        self.messages.finish_send((stage, Op.SEND_F, microbatch))
        return grad

    def _before_last(self, action: Action) -> None:
        """Prepare the last B or W of a chunk, after which its gradients are complete."""
        if action.microbatch == self.shape.num_microbatches - 1:
            self.data_parallel.before_last_backward(self.shape.chunk_of(action.stage))

    def _keep(self, action: Action, input_grad: Tensor | None) -> None:
        """Keep the gradient of a stage's input for its SEND_B."""
        stage, _, microbatch = action
        if stage > 0:
            if input_grad is None:
                raise RuntimeError(f"{action} gave no gradient for its input, but the previous rank waits for one")
            assert microbatch is not None, "a backward has a microbatch"
            self._input_grads[stage, microbatch] = input_grad

    def _send_forward(self, action: Action) -> None:
        assert action.microbatch is not None, "a send has a microbatch"
        key = action.stage, action.microbatch
        output = self._outputs.pop(key) if self.forward_only else self._outputs[key]
        self.messages.send(action, output, self.compute.release)

    def _send_backward(self, action: Action) -> None:
        assert action.microbatch is not None, "a send has a microbatch"
        self.messages.send(action, self._input_grads.pop((action.stage, action.microbatch)))

    def _unshard(self, action: Action) -> None:
        self.data_parallel.unshard(self.shape.chunk_of(action.stage))

    def _reshard(self, action: Action) -> None:
        self.data_parallel.reshard(self.shape.chunk_of(action.stage))

    def _reduce_grad(self, action: Action) -> None:
        self.data_parallel.reduce_grad(self.shape.chunk_of(action.stage))

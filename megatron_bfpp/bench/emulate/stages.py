"""Emulated model chunks: the forward and the backward of a stage sleep for the time they would take.

They are real modules with real autograd, parameters and gradients, small ones: a schedule, DDP and the messages treat
them as they treat a model. Tensors are [1, 1, 2] in float64: a number and the stamp of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.weight_gradients import placeholder
from ...schedule import Action, Op
from .network import Network, sleep_until

HIDDEN = 2  # of the tensors between stages


class Sleep(torch.autograd.Function):
    """Compute x * weight, each way after a sleep."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: "Layer") -> torch.Tensor:
        layer.before_work()
        until = layer.network.work(layer.forward_s)
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        output = x * weight
        sleep_until(until)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: Layer = ctx.layer
        layer.before_work()
        owed = layer.network.owed
        is_owed = owed is not None and owed.is_deferring
        op = Op.I if is_owed else layer.network.backward
        until = layer.network.work(layer.backward_s[op])
        x, weight = ctx.saved_tensors
        grad = grads[0]
        # The last number is the stamp of the message that brought it, not a gradient.
        of_weight = (grad * x)[..., :-1].sum().reshape(1)
        of_input = grad * weight
        sleep_until(until)
        if owed is not None and is_owed:
            owed.owe(layer.weight, _WeightGradient(layer, of_weight))
            return of_input, placeholder(layer.weight), None
        if op is not Op.I:
            layer.after_weights()
        return of_input, of_weight, None


@dataclass(frozen=True)
class _WeightGradient:
    """The gradient of a layer's weight that an I of this plugin owes; its W sleeps for it."""

    layer: "Layer"
    value: torch.Tensor

    def prepare(self) -> None:
        """Do nothing: no other rank has a part of it."""

    def compute(self) -> torch.Tensor:
        until = self.layer.network.work(self.layer.backward_s[Op.W])
        sleep_until(until)
        return self.value


class Layer(torch.nn.Module):
    """A part of a stage with one parameter, which a bucket of gradients can hold.

    before_work waits for the parameter. after_weights is called in a backward that has made its gradient.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network, costs = network, network.case.costs
        self.forward_s = costs.of(Action(0, Op.F)) / costs.buckets
        self.backward_s = {op: costs.of(Action(0, op)) / costs.buckets for op in (Op.B, Op.I, Op.W)}
        self.before_work: Callable[[], None] = lambda: None
        self.after_weights: Callable[[], None] = lambda: None
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = Sleep.apply(x, self.weight, self)
        return output


class EmulatedChunk(torch.nn.Module):
    """A model chunk as far as Megatron's schedules need it.

    repeat: stages in a row, of a rank of a pipeline without chunks.
    """

    def __init__(self, config: Any, vp_stage: int | None, network: Network, repeat: int = 1):
        super().__init__()
        self.config, self.vp_stage, self.model_type, self.network = config, vp_stage, None, network
        self.layers = torch.nn.ModuleList(Layer(network) for _ in range(network.case.costs.buckets * repeat))
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self._received = tensors[0]

    def forward(self, given: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layers. given: the input, where it comes as an argument (torch.distributed.pipelining)."""
        x = self._received if given is None else given
        if x is None:
            x = torch.ones(1, 1, HIDDEN, dtype=torch.float64)
        for layer in self.layers:
            x = layer(x)
        return x

"""The stages of torch's arms: its PipelineStage over emulated chunks, alone and under its DDP. Runs in each rank."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed.pipelining import PipelineStage

from ..integration.seams import changed
from ..schedule import Op
from .emulate.collectives import Collective, Collectives
from .emulate.stages import EmulatedChunk

_OPS = {"full": Op.B, "input": Op.I, "weight": Op.W}


class EmulatedStage(PipelineStage):
    """A stage of torch.distributed.pipelining that tells its chunk what of a backward torch runs.

    torch runs a split backward as two passes over the same graph, and the function of a layer, which is Python, twice.
    On the first stage of the model, whose input takes no gradient, its I does nothing and its W the whole backward.
    """

    def __init__(self, chunk: EmulatedChunk, module: torch.nn.Module, *args: Any, **kwargs: Any):
        super().__init__(module, *args, **kwargs)
        self._network = chunk.network

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        with changed(self._network, backward=_OPS[backward_type]):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


class ReplicatedStage(EmulatedStage):
    """A stage whose module is in torch's DistributedDataParallel.

    torch launches the all-reduce of a bucket in the last backward of a stage, as soon as its gradients are there, and
    waits for all of them at the end of that backward. An all-reduce is a reduce-scatter and an all-gather. Where the
    backward is split that is the last W: the emulation lets DDP reduce there, although in torch 2.14.1 it does not see
    the gradients of a W, and reduces none of them.
    """

    def __init__(self, chunk: EmulatedChunk, *args: Any, collectives: Collectives, **kwargs: Any):
        ddp = torch.nn.parallel.DistributedDataParallel(chunk, process_group=parallel_state.get_data_parallel_group())
        super().__init__(chunk, ddp, *args, **kwargs)
        self._collectives, self._is_last, self._launched = collectives, False, list[Collective]()
        layers: list[Any] = list(chunk.layers)
        for layer in layers:
            layer.after_weights = self._launch

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        self._is_last = last_backward
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        for collective in self._launched:
            self._collectives.wait(collective)
        self._launched.clear()
        return result

    def _launch(self) -> None:
        if self._is_last:
            costs = self._collectives.network.case.costs
            self._launched.append(self._collectives.launch((costs.reduction + costs.gather) / costs.buckets))

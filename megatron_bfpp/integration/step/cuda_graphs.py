"""Megatron's own CUDA graphs (--cuda-graph-impl local) in a breadth-first step. Not run on a GPU.

Every layer has two graphs per micro-batch, of its forward and of its backward. The first training step runs without
them and notes its order; at its end they are captured in that order, and memory that is free after one of them serves
those after it. So every later training step has to run in that order, with as many micro-batches as the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.utils import MakeViewlessTensor
from torch.nn import Module

from .. import process
from ..seams import changed
from .call import CallError, StepCall


def are_used(config: Any) -> bool:
    """Return whether Megatron's layers run as graphs."""
    return getattr(config, "cuda_graph_impl", None) == "local"


def around(call: StepCall, config: Any) -> AbstractContextManager[None]:
    """Check the micro-batches of a training step; leave the graphs out of an evaluation."""
    if not are_used(config):
        return nullcontext()
    modules = (module for chunk in call.model for module in chunk.modules())
    managers = [module for module in modules if isinstance(module, cuda_graphs.CudaGraphManager)]
    if call.forward_only:
        return _without(managers)
    for graphs in (len(manager.cudagraph_runners) for manager in managers):
        if graphs not in (0, call.num_microbatches):
            raise CallError(
                f"this step has {call.num_microbatches} micro-batches, but the CUDA graphs were captured in the order "
                f"of a step with {graphs}.\n  Keep the batch size, or use --cuda-graph-impl none."
            )
    return nullcontext()


def before_forward(chunk: Module) -> None:
    """Let every micro-batch have rotary embeddings of its own in the step that is noted.

    Megatron caches them. Since 0.19 it captures no backward while an input is left that a later forward shares.
    """
    if not cuda_graphs._CudagraphGlobalRecord.cudagraph_created:
        for module in chunk.modules():
            getattr(type(module).forward, "cache_clear", bool)()


def output_of(output: torch.Tensor) -> torch.Tensor:
    """Return another tensor over the memory of a graph's output.

    Megatron takes the memory from a tensor that is sent; the graph's own would have none in the next step.
    """
    another: torch.Tensor = MakeViewlessTensor.apply(output, output.requires_grad)
    return another


def create(call: StepCall, config: Any) -> None:
    """Capture the graphs at the end of the first training step.

    A capture waits for the device, so no receive may be pending, and lets no thread query an event, as the watchdog
    does once an action has taken too long.
    """
    if are_used(config) and not call.forward_only:
        process.ACTIVITY.end()
        cuda_graphs.create_cudagraphs()


@contextmanager
def _without(managers: list[Any]) -> Iterator[None]:
    """Let the layers run without graphs.

    Megatron would replay those of the training, dropout and all, and the next training step would begin with the graph
    after the last one replayed, in another order than that of the captures.
    """
    with ExitStack() as stack:
        stack.enter_context(changed(cuda_graphs._CudagraphGlobalRecord, cudagraph_created=False))
        for manager in managers:
            stack.enter_context(changed(manager, training=False))
        yield

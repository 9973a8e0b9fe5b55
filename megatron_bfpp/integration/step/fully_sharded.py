"""Adds what Megatron's chunks lack for --use-torch-fsdp2 with pipeline ranks.

Megatron's own parts serve as they are: the wrapper that shards (TorchFullyShardedDataParallel), clipping, norms,
optimizers and checkpoints handle sharded tensors. `data_parallel` and the seams of fully_sharded_seams.py add the rest.
"""

from functools import partial
from typing import Any

import torch

from ...runtime.fully_sharded import FullySharded
from .groups import reduction_group


def is_sharded(model: list[torch.nn.Module]) -> bool:
    """Return whether Megatron has wrapped the chunks with FSDP2."""
    from megatron.core.distributed import TorchFullyShardedDataParallel

    return isinstance(model[0], TorchFullyShardedDataParallel)


def data_parallel(model: list[Any], config: Any) -> FullySharded:
    """Return the runtime's FullySharded over Megatron's wrappers of the chunks.

    bf16 gradients are added up over micro-batches and replicas and given to the optimizer in fp32, as Megatron's DDP
    does under --bf16. Megatron's FSDP2 wrapper does not ask for that.
    """
    for chunk in model:
        # The step ends with all gradients reduced. Megatron's wrapper does not take finalize's argument before 0.19.
        chunk.finish_grad_sync = lambda force_all_reduce=False: None
        if config.calculate_per_token_loss:
            chunk.scale_gradients = partial(_scale_gradients, chunk)
    return FullySharded(
        [chunk.module for chunk in model],
        sum_dtype=torch.float32 if config.bf16 else None,
        average=not config.calculate_per_token_loss,
        new_group=reduction_group,
    )


def _scale_gradients(chunk: torch.nn.Module, factor: Any) -> None:
    """Multiply the summed gradients, which Megatron's wrapper leaves out: a loss per token divides by the tokens."""
    for parameter in chunk.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)

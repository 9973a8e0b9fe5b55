"""--use-torch-fsdp2 with pipeline ranks: what Megatron's chunks lack.

Megatron's own parts serve as they are: the wrapper that shards (TorchFullyShardedDataParallel), clipping, norms, optimizers
and checkpoints know sharded tensors. What they miss is added to the chunks by `data_parallel`, and by the seams of
fully_sharded_seams.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...runtime.fully_sharded import FullySharded


def is_sharded(model: list[torch.nn.Module]) -> bool:
    """Whether Megatron has wrapped the chunks with FSDP2."""
    from megatron.core.distributed import TorchFullyShardedDataParallel

    return isinstance(model[0], TorchFullyShardedDataParallel)


def data_parallel(model: list[Any], config: Any) -> FullySharded:
    """The runtime's FullySharded over Megatron's wrappers of the chunks.

    Gradients of bf16 are added up over micro-batches and replicas in fp32, as Megatron's DDP does under --bf16. Its FSDP2
    wrapper does not ask for that.
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
    )


def _scale_gradients(chunk: torch.nn.Module, factor: Any) -> None:
    """With a loss per token Megatron divides summed gradients by the number of tokens; its wrapper leaves that out."""
    for parameter in chunk.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)

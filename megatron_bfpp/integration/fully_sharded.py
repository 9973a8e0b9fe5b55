"""--use-torch-fsdp2 with pipeline ranks: what is refused, and what Megatron's chunks lack.

Megatron's own parts serve as they are: the wrapper that shards (TorchFullyShardedDataParallel), clipping, norms, optimizers
and checkpoints know sharded tensors. What they miss is added to the chunks by `data_parallel`, and by the seams of
fully_sharded_seams.py.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from ..runtime.fully_sharded import FullySharded
from .settings import RESIDENT_CHUNKS, Settings

_FLAG, _RESIDENT = "--use-torch-fsdp2", "--breadth-first-resident-chunks"


def refuse_under_1f1b(args: Any) -> None:
    """UserError for sharded parameters with pipeline ranks: Megatron would stop at an assertion, or in building the model."""
    if getattr(args, "pipeline_model_parallel_size", 1) < 2:
        return
    if getattr(args, "use_torch_fsdp2", False):
        raise UserError(
            f"{_FLAG} does not work with pipeline ranks under --pipeline-schedule 1f1b: Megatron refuses it, and it would "
            f"gather and reduce once per micro-batch.\n  Use --pipeline-schedule breadth-first, or leave out {_FLAG}."
        )
    if getattr(args, "use_megatron_fsdp", False):
        raise UserError(
            "--use-megatron-fsdp does not work with pipeline ranks: its device mesh cannot be built with them.\n"
            f"  Use {_FLAG} with --pipeline-schedule breadth-first, or leave it out."
        )


def refuse(args: Any, settings: Settings) -> None:
    """UserError for what breadth-first cannot shard; the rest is Megatron's to refuse."""
    if not getattr(args, "use_torch_fsdp2", False):
        if settings.resident_chunks is not None:
            raise UserError(
                f"{_RESIDENT} is {settings.resident_chunks}, but without {_FLAG} all chunks are resident.\n"
                f"  Leave out {_RESIDENT}, or add {_FLAG}."
            )
        return
    if settings.engine == "megatron":
        raise UserError(
            f"{_FLAG} does not work with --breadth-first-engine megatron: its loop gathers and reduces once per "
            "micro-batch.\n  Use --breadth-first-engine plan."
        )
    if getattr(args, "ckpt_format", None) == "torch_dcp":
        raise UserError(
            f"--ckpt-format torch_dcp does not work with pipeline ranks: it names layers by their place in a chunk, so that "
            f"chunks would overwrite each other.\n  Use --ckpt-format torch_dist, also with {_FLAG}."
        )
    keeps = getattr(args, "save", None) or getattr(args, "load", None)
    if keeps and getattr(args, "swiglu", False) and not _splits_gated_layers():
        raise UserError(
            f"{_FLAG} cannot save or load --swiglu with this Megatron: before megatron-core 0.19 it mixes up the halves of "
            "the gated layers.\n  Use megatron-core 0.19 or later, or leave out --save and --load."
        )


def _splits_gated_layers() -> bool:
    """Whether checkpoints tell the two halves of a gated layer apart when a replica holds a part of one."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    return "dp_group" in inspect.signature(apply_swiglu_sharded_factory).parameters


def check_resident_chunks(args: Any, settings: Settings) -> None:
    """UserError if more chunks may be resident than a rank has. Once Megatron has completed the arguments."""
    chunks = args.virtual_pipeline_model_parallel_size
    if settings.resident_chunks is not None and settings.resident_chunks > chunks:
        raise UserError(
            f"{_RESIDENT} is {settings.resident_chunks}, but a rank has {chunks} model chunks.\n  Use 1 to {chunks}."
        )


def resident_chunks(settings: Settings, chunks: int) -> int:
    """How many chunks of a rank may be gathered at one time."""
    return min(settings.resident_chunks or RESIDENT_CHUNKS, chunks)


# The chunks


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

"""Refuse combinations of flags with --use-torch-fsdp2 and pipeline ranks."""

import inspect
from typing import Any

from ...console.errors import UserError
from ...schedule.model.pattern import letters_of
from .settings import Settings, is_sharded

_FLAG, _RESIDENT = "--use-torch-fsdp2", "--breadth-first-resident-chunks"


def refuse_under_1f1b(args: Any) -> None:
    """Refuse sharded parameters with pipeline ranks: Megatron would stop at an assertion, or in building the model."""
    if getattr(args, "pipeline_model_parallel_size", 1) < 2:
        return
    if is_sharded(args):
        raise UserError(
            f"{_FLAG} does not work with pipeline ranks under --pipeline-schedule 1f1b: Megatron refuses it, and it "
            "would gather and reduce once per micro-batch.\n"
            f"  Use --pipeline-schedule breadth-first, or leave out {_FLAG}."
        )
    if getattr(args, "use_megatron_fsdp", False):
        raise UserError(
            "--use-megatron-fsdp does not work with pipeline ranks: its device mesh cannot be built with them.\n"
            f"  Use {_FLAG} with --pipeline-schedule breadth-first, or leave it out."
        )


def refuse(args: Any, settings: Settings) -> None:
    """Refuse what breadth-first cannot shard; the rest is Megatron's to refuse."""
    if not is_sharded(args):
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
            "--ckpt-format torch_dcp does not work with pipeline ranks: it names layers by their place in a chunk, so "
            f"that chunks would overwrite each other.\n  Use --ckpt-format torch_dist, also with {_FLAG}."
        )
    if not (getattr(args, "save", None) or getattr(args, "load", None)):
        return
    if lost := _not_in_checkpoints(args):
        raise UserError(
            f"{_FLAG} cannot save or load {' and '.join(lost)}: Megatron's checkpoints do not take parts of their "
            "tensors.\n  Use --use-distributed-optimizer, or leave out --save and --load."
        )
    if getattr(args, "swiglu", False) and not _splits_gated_layers():
        raise UserError(
            f"{_FLAG} cannot save or load --swiglu with this Megatron: before megatron-core 0.19 it mixes up the "
            "halves of the gated layers.\n  Use megatron-core 0.19 or later, or leave out --save and --load."
        )


def _not_in_checkpoints(args: Any) -> list[str]:
    """Return the kinds of layers whose sharded_state_dict fails, at the first save, where a replica holds a part."""
    kinds = {*letters_of(args)}
    if not kinds and getattr(args, "num_experts", None):
        kinds.add("E")
    if getattr(args, "experimental_attention_variant", None) == "gated_delta_net":
        kinds.add("G")
    names = {"E": "experts", "M": "Mamba layers", "G": "gated delta nets"}
    return [name for kind, name in names.items() if kind in kinds]


def _splits_gated_layers() -> bool:
    """Return whether checkpoints tell the halves of a gated layer apart when a replica holds a part of one."""
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    return "dp_group" in inspect.signature(apply_swiglu_sharded_factory).parameters


def check_resident_chunks(args: Any, settings: Settings) -> None:
    """Refuse more resident chunks than a rank has. To be called when Megatron has completed the arguments."""
    chunks = args.virtual_pipeline_model_parallel_size
    if settings.resident_chunks is not None and settings.resident_chunks > chunks:
        raise UserError(
            f"{_RESIDENT} is {settings.resident_chunks}, but a rank has {chunks} model chunks.\n  Use 1 to {chunks}."
        )

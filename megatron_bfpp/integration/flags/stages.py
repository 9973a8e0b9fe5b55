"""After Megatron has read the command line: which stage gets which layers, by Megatron's own functions, checked and told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

from ...console.errors import UserError
from .placement import LAYOUT, is_hybrid

MOST_RUNS = 20  # of stages with the same number of layers that the line names before it stops


class Stage(NamedTuple):
    """One stage as Megatron will build it."""

    layers: int
    offset: int  # layers before it in the model


def check_placement(args: Any) -> str:
    """The placement of validated arguments in one line; UserError where a layer would be missing or built twice."""
    _check_chunks(args)
    if is_hybrid(args):
        return f"placement of {args.num_layers} layers: as --hybrid-layer-pattern says"
    stages = stages_of(args)
    _check_sum(args, stages)
    return placement_line([stage.layers for stage in stages], args.pipeline_model_parallel_size)


def stages_of(args: Any) -> list[Stage]:
    """Every stage in order, asked of the functions that Megatron's models ask; UserError where they cannot answer.

    Of a model without chunks, as 1F1B has it, the stages are the pipeline ranks.
    """
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pp_size, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    stages = []
    try:
        config = _config_of(args)
        for chunk in [None] if chunks is None else range(chunks):
            for pp_rank in range(pp_size):
                with _as_rank(pp_rank, chunks):
                    layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=pp_rank)
                    stages.append(Stage(layers, get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=pp_rank)))
        if config.pipeline_model_parallel_layout is not None:
            _check_count(args, [stage.layers for stage in stages])
            config.pipeline_model_parallel_layout.validate_layer_layout(
                args.num_layers, getattr(args, "mtp_num_layers", None)
            )
    except AssertionError as error:  # how Megatron refuses
        flag = LAYOUT if getattr(args, "pipeline_model_parallel_layout", None) is not None else "the split into chunks"
        raise UserError(
            f"Megatron cannot place {args.num_layers} layers on {pp_size} pipeline ranks x {chunks or 1} chunks: "
            f"{' '.join(str(error).split())}.\n  Change {flag}, or leave it out: the plugin then chooses."
        ) from None
    return stages


def placement_line(layers: list[int], pp_size: int) -> str:
    """Layers of every stage and of every rank; n*k is k in a row with n each."""
    per_rank = [sum(layers[rank::pp_size]) for rank in range(pp_size)]
    return (
        f"placement of {sum(layers)} layers, {len(layers)} stages in order: {_runs(layers)}"
        f" (pp_rank 0 to {pp_size - 1}: {_runs(per_rank)})"
    )


def _check_chunks(args: Any) -> None:
    """With fewer than 2 chunks Megatron would run another schedule, in silence."""
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None)
    if chunks is None or chunks < 2:
        raise UserError(
            "--pipeline-schedule breadth-first needs at least 2 model chunks per rank, but the layers are split into "
            f"{chunks or 1}.\n  Use --num-virtual-stages-per-pipeline-rank 2 or more, or a {LAYOUT} "
            f"with {2 * args.pipeline_model_parallel_size} or more stages."
        )


def _check_sum(args: Any, stages: list[Stage]) -> None:
    _check_count(args, [stage.layers for stage in stages])
    before = 0
    for number, stage in enumerate(stages):
        if stage.layers and stage.offset != before:
            raise UserError(
                f"Megatron's stage {number} begins with layer {stage.offset}, but {before} layers stand before it: "
                f"layers would be skipped or built twice.\n  Say which layers go where with {LAYOUT}."
            )
        before += stage.layers


def _check_count(args: Any, layers: list[int]) -> None:
    if sum(layers) != args.num_layers:
        pp_size = args.pipeline_model_parallel_size
        raise UserError(
            f"the stages hold {sum(layers)} layers, but --num-layers is {args.num_layers}: "
            f"{placement_line(layers, pp_size)}.\n"
            f"  Change --num-layers to {sum(layers)}, or {LAYOUT}, or leave the latter out: the plugin then makes one."
        )


def _config_of(args: Any) -> SimpleNamespace:
    """What Megatron's functions read of a TransformerConfig, under its names. No real one: its checks need the GPU's libraries.

    In a YAML file the model stands under language_model, with the names of the configuration.
    """
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    pp_size, model = args.pipeline_model_parallel_size, getattr(args, "language_model", args)
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    ends = {
        f"num_layers_in_{end}_pipeline_stage": getattr(
            model, f"decoder_{end}_pipeline_num_layers", getattr(model, f"num_layers_in_{end}_pipeline_stage", None)
        )
        for end in ("first", "last")
    }
    accounts = {
        name: getattr(model, name, False)
        for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    }
    return SimpleNamespace(
        **ends,
        **accounts,
        num_layers=args.num_layers,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=None if layout is None else PipelineParallelLayerLayout(layout, pp_size),
    )


@contextmanager
def _as_rank(pp_rank: int, chunks: int | None) -> Iterator[None]:
    """Megatron's layouts ask its global state, which is not there yet, where they are."""
    from megatron.core import parallel_state

    rank_before = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK  # its getter would ask a process group
    chunks_before = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_pipeline_model_parallel_rank(pp_rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(rank_before)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks_before)


def _runs(counts: list[int]) -> str:
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    text = " ".join(f"{count}*{times}" if times > 1 else str(count) for count, times in runs[:MOST_RUNS])
    return text + " ..." * (len(runs) > MOST_RUNS)

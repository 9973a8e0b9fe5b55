"""Find the layers of every stage by Megatron's own functions, once it has read the command line, and check them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

from ...console.errors import UserError
from ...schedule.model.chunks import LAYOUT, check_chunks
from ...schedule.model.layout import runs_of
from ...schedule.model.pattern import PATTERN, is_hybrid
from ..seams import changed
from .hybrid import allocation


class Stage(NamedTuple):
    """One stage as Megatron will build it."""

    layers: int
    offset: int  # layers before it in the model
    kinds: str = ""  # of a hybrid model, a letter per layer


def check_placement(args: Any) -> str:
    """Return the placement of validated arguments, a line; UserError where a layer would be missing or built twice."""
    check_chunks(getattr(args, "virtual_pipeline_model_parallel_size", None), args.pipeline_model_parallel_size)
    stages = stages_of(args)
    _check_sum(args, stages)
    line = placement_line([stage.layers for stage in stages], args.pipeline_model_parallel_size)
    return f"{line}: {'|'.join(stage.kinds for stage in stages)}" if is_hybrid(args) else line


def stages_of(args: Any) -> list[Stage]:
    """Return every stage in order, from the functions that Megatron's models ask; UserError where they cannot answer.

    The stages of a model without chunks, as under 1F1B, are the pipeline ranks.
    """
    if is_hybrid(args):
        return _segments_of(args)
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


def _segments_of(args: Any) -> list[Stage]:
    """Return the stages of a hybrid model, from the function that it asks for its part of the pattern."""
    megatron, pp_size = allocation(), args.pipeline_model_parallel_size
    chunks = args.virtual_pipeline_model_parallel_size
    main = megatron.parse_hybrid_pattern(args.hybrid_layer_pattern).main_pattern or ""
    ends = [getattr(args, f"decoder_{end}_pipeline_num_layers", None) for end in ("first", "last")]
    stages = []
    for chunk in [None] if chunks is None else range(chunks):
        for pp_rank in range(pp_size):
            # The function asks torch where it is, and tells it to the log of that rank; there are no groups yet.
            where = SimpleNamespace(get_rank=lambda _, rank=pp_rank: rank, get_world_size=lambda _: pp_size)
            torch = SimpleNamespace(distributed=where)
            with changed(megatron, torch=torch, log_on_each_pipeline_stage=_ignore, log_single_rank=_ignore):
                try:
                    kinds, offset = megatron.select_pipeline_segment(main, object(), chunk, *ends)
                except ValueError as error:  # how Megatron refuses
                    wrong = f"Megatron cannot place {PATTERN} '{args.hybrid_layer_pattern}'"
                    raise UserError(f"{wrong}: {' '.join(str(error).split())}.\n  Change the pattern.") from None
            stages.append(Stage(len(kinds), offset, "".join(kinds)))
    return stages


def _ignore(*_: Any, **__: Any) -> None:
    pass


def placement_line(layers: list[int], pp_size: int) -> str:
    """Return a line with the layers of every stage and of every rank; n*k means k in a row with n each."""
    per_rank = [sum(layers[rank::pp_size]) for rank in range(pp_size)]
    return (
        f"placement of {sum(layers)} layers, {len(layers)} stages in order: {runs_of(layers)}"
        f" (pp_rank 0 to {pp_size - 1}: {runs_of(per_rank)})"
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
    """Return what Megatron's functions read of a TransformerConfig. A real one's checks need the GPU's libraries.

    What they do not read in a tested release has the value of the command line, or the configuration's default.
    In a YAML file the model stands under language_model, with the names of the configuration.
    """
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_config import TransformerConfig

    pp_size, model = args.pipeline_model_parallel_size, getattr(args, "language_model", args)
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    others = {
        field.name: getattr(model, field.name, None if field.default is MISSING else field.default)
        for field in fields(TransformerConfig)
    }
    ends = {
        f"num_layers_in_{end}_pipeline_stage": getattr(
            model, f"decoder_{end}_pipeline_num_layers", getattr(model, f"num_layers_in_{end}_pipeline_stage", None)
        )
        for end in ("first", "last")
    }
    return SimpleNamespace(**{
        **others, **ends,
        "num_layers": args.num_layers,
        "pipeline_model_parallel_size": pp_size,
        "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": None if layout is None else PipelineParallelLayerLayout(layout, pp_size),
    })  # fmt: skip


@contextmanager
def _as_rank(pp_rank: int, chunks: int | None) -> Iterator[None]:
    """Set the global state by which Megatron's layouts know where they are; it is not there yet."""
    from megatron.core import parallel_state

    state = {"_MPU_PIPELINE_MODEL_PARALLEL_RANK": pp_rank, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": chunks}
    with changed(parallel_state, **state):
        yield

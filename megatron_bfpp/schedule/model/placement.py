"""Choose the model chunks of each rank from Megatron's arguments; lay out layers that do not divide.

Megatron's virtual pipeline stages are the paper's looping placement (stage = chunk * pp_size + pp_rank). Where the
layers can be shared out evenly, only the number of chunks is to choose. Where they cannot, and the user has not said
otherwise, the stages get a layout in Megatron's own notation, with the embedding and the loss counted as a layer each.
"""

from typing import Any

from ...console.errors import UserError
from ..ir import PipelineShape
from .chunks import (
    BUBBLE_GOAL,
    CHUNKS,
    FLAGS,
    LAYERS,
    LAYOUT,
    MOST_CHUNKS,
    NEEDS_2,
    SHARES,
    fewest_that_suffice,
    given,
    name_of,
    predicted_bubble,
)  # fmt: skip
from .layout import layers_of_stages, layout_of, other_layers


def place_layers(args: Any, microbatches: int) -> list[str]:
    """Set what the arguments leave open and return a line about it; UserError if the layers cannot be placed.

    args: Megatron's, before it validates them. microbatches: of a step; of the longest where they grow.
    """
    flag, value = _named(args)
    if flag == LAYOUT:
        return []
    num_layers = _num_layers(args)
    if num_layers is None:
        if flag is None:
            wrong = "the number of layers is not on the command line: it cannot be divided into chunks"
            raise UserError(f"{wrong}.\n  Add {CHUNKS} 2 or more.")
        return []
    per_rank = _layers_per_rank(args, num_layers)
    if flag is None:
        choices = _even_choices(per_rank)
        if choices:
            chunks, why = _choose(args.pipeline_model_parallel_size, microbatches, choices)
            args.num_virtual_stages_per_pipeline_rank = chunks
            return [f"chose {CHUNKS} {chunks}: {why}"]
    elif per_rank and all(count % value == 0 for count in per_rank):
        if flag == LAYERS and per_rank[0] <= value:
            raise UserError(_one_chunk(num_layers, args.pipeline_model_parallel_size, value))
        return []
    shares = given(args, SHARES)
    if shares:
        pp_size = args.pipeline_model_parallel_size
        raise UserError(_does_not_divide(num_layers, pp_size, per_rank, flag, value, " and ".join(shares)))
    return _lay_out(args, microbatches, num_layers, flag, value)


def _named(args: Any) -> tuple[str | None, Any]:
    """Return the one flag that splits the layers into chunks, and its value; None where the user gives none."""
    named, shares, ends = given(args, FLAGS), given(args, SHARES), given(args, SHARES[:2])
    if len(named) > 1:
        both = f"{' and '.join(named)} both say how the layers are split into chunks"
        raise UserError(f"{both}.\n  Give one of them: {', '.join(FLAGS)}.")
    if named == [LAYOUT] and shares:
        raise UserError(f"{LAYOUT} and {shares[0]} both say which layers go where.\n  Leave out {shares[0]}.")
    if len(ends) == 2 and args.pipeline_model_parallel_size == 2:
        between = "leaves no rank in between: Megatron cannot place chunks so on 2 pipeline ranks"
        raise UserError(f"{' with '.join(ends)} {between}.\n  Leave out one of them: the other rank gets the rest.")
    if ends and len(shares) > len(ends):
        counted = " and ".join(shares[len(ends) :])
        wrong = f"{ends[0]} does not go with {counted}: Megatron counts embedding and loss as layers only without it"
        raise UserError(f"{wrong}.\n  Leave out one of the two, or both and say which layers go where with {LAYOUT}.")
    if not named:
        return None, None
    flag, value = named[0], getattr(args, name_of(named[0]))
    if flag == CHUNKS and value < 2:
        instead = "Use 2 or more, or leave the flag out: the plugin chooses"
        raise UserError(f"{NEEDS_2}, but {CHUNKS} is {value}.\n  {instead}.")
    if flag == LAYERS and (value < 1 or ends):
        wrong = f"is {value}" if value < 1 else f"does not go with {ends[0]}"
        raise UserError(f"{LAYERS} {wrong}.\n  Use {CHUNKS} 2 or more instead, or leave both out: the plugin chooses.")
    return flag, value


def _num_layers(args: Any) -> int | None:
    """Return the number of layers; None where Megatron has yet to read it from a description of every layer."""
    files = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
    if any(getattr(args, name, None) is not None for name in files):
        return None
    return args.num_layers if args.num_layers is not None else getattr(args, "encoder_num_layers", None)


def _layers_per_rank(args: Any, num_layers: int) -> list[int]:
    """Return the layers of each kind of pipeline rank, with what Megatron counts as a layer; [] if uneven."""
    first, last = (getattr(args, name_of(flag), None) for flag in SHARES[:2])
    total = num_layers + len(given(args, SHARES[2:]))
    middle_ranks = args.pipeline_model_parallel_size - (first is not None) - (last is not None)
    middle = total - (first or 0) - (last or 0)
    if middle < middle_ranks or (middle % middle_ranks if middle_ranks else middle):
        return []
    return [each for each in (first, last) if each is not None] + [middle // middle_ranks] * bool(middle_ranks)


def _even_choices(per_rank: list[int]) -> list[int]:
    most = min([MOST_CHUNKS, *per_rank]) if per_rank else 0
    return [chunks for chunks in range(2, most + 1) if all(count % chunks == 0 for count in per_rank)]


def _choose(pp_size: int, microbatches: int, choices: list[int]) -> tuple[int, str]:
    """Return the chunks per rank, and why."""
    for chunks in choices:
        bubble = predicted_bubble(PipelineShape(pp_size, chunks, microbatches))
        if bubble < BUBBLE_GOAL:
            break
    goal = "the fewest with a predicted bubble below" if bubble < BUBBLE_GOAL else "the most that divide; goal:"
    return chunks, f"{goal} {BUBBLE_GOAL:.0%} of the step ({bubble:.1%} with {microbatches} micro-batches)"


def _lay_out(args: Any, microbatches: int, num_layers: int, flag: str | None, value: Any) -> list[str]:
    """Set a layout in place of the flag that cannot be met evenly, and return a line about it."""
    pp_size, mtp_layers = args.pipeline_model_parallel_size, getattr(args, "mtp_num_layers", None) or 0
    fewest = value if flag == CHUNKS else 2
    if flag == LAYERS and num_layers <= pp_size * value:
        raise UserError(_one_chunk(num_layers, pp_size, value))
    if num_layers < pp_size * fewest:
        raise UserError(_too_few(num_layers, pp_size, fewest))
    if flag == CHUNKS:
        chunks = value
    elif flag == LAYERS:
        chunks = _chunks_of_at_most(value, num_layers, pp_size, mtp_layers)
    else:
        chunks = _choose_uneven(pp_size, microbatches, num_layers, mtp_layers)
    layers = layers_of_stages(num_layers, pp_size, chunks, mtp_layers)
    args.num_virtual_stages_per_pipeline_rank = args.num_layers_per_virtual_pipeline_stage = None
    args.pipeline_model_parallel_layout = layout_of(layers, mtp_layers)
    instead = f" in place of {flag} {value}" if flag else ""
    how = f"{pp_size} x {chunks} stages with embedding and loss counted as a layer each"
    made = f"{LAYOUT} '{args.pipeline_model_parallel_layout}'{instead}"
    return [f"set {made}: {num_layers} layers do not divide evenly; {how}"]


def _one_chunk(num_layers: int, pp_size: int, layers: int) -> str:
    found = f"{num_layers} layers on {pp_size} pipeline ranks with {LAYERS} {layers} are 1"
    return f"{NEEDS_2}, but {found}.\n  Use a smaller number, or {CHUNKS} 2 instead, or leave both out."


def _chunks_of_at_most(most: int, num_layers: int, pp_size: int, mtp_layers: int) -> int:
    """Return the fewest chunks per rank whose stages hold at most so many decoder layers."""
    for chunks in range(max(2, -(-num_layers // (pp_size * most))), num_layers // pp_size + 1):
        if max(layers_of_stages(num_layers, pp_size, chunks, mtp_layers)) <= most:
            return chunks
    raise UserError(
        f"{num_layers} layers on {pp_size} pipeline ranks cannot be split into stages of 1 to {most} layers.\n"
        f"  Use {LAYERS} {most + 1}, or {CHUNKS} 2, or leave both out: the plugin chooses."
    )


def _choose_uneven(pp_size: int, microbatches: int, num_layers: int, mtp_layers: int) -> int:
    """Choose chunks as _choose does, counting the time that ranks wait for the longest stage of a chunk."""

    def loads_of(chunks: int) -> list[float]:
        layers = layers_of_stages(num_layers, pp_size, chunks, mtp_layers)
        return [count + other for count, other in zip(layers, other_layers(len(layers), mtp_layers))]

    return fewest_that_suffice(pp_size, microbatches, num_layers // pp_size, loads_of)


def _too_few(num_layers: int, pp_size: int, chunks: int) -> str:
    ways = [f"--num-layers {pp_size * chunks} or more"]
    if num_layers // chunks >= 2:
        ways.append(f"--pipeline-model-parallel-size {num_layers // chunks} or less")
    if chunks > 2 and num_layers >= 2 * pp_size:
        ways.append(f"{CHUNKS} {num_layers // pp_size} or less")
    stages = f"{pp_size} x {chunks} stages ({pp_size} pipeline ranks, {chunks} chunks each)"
    wrong = f"--pipeline-schedule breadth-first needs a layer in each of {stages}, but --num-layers is {num_layers}"
    return f"{wrong}.\n  Use {', or '.join(ways)}."


def _does_not_divide(
    num_layers: int, pp_size: int, per_rank: list[int], flag: str | None, value: Any, shares: str
) -> str:
    if not per_rank:
        what = f"{num_layers} layers cannot be shared out evenly to {pp_size} pipeline ranks"
    else:
        left = " or ".join(map(str, sorted(set(per_rank))))
        which = f"{flag} {value} does not divide" if flag else f"no number of chunks from 2 to {MOST_CHUNKS} divides"
        what = f"{num_layers} layers on {pp_size} pipeline ranks leave {left} per rank, which {which}"
    fewest = pp_size * (value if flag == CHUNKS else 2)
    without = f"Leave out {shares}" if num_layers >= fewest else f"Use --num-layers {fewest} or more without {shares}"
    instead = f"{without}: the plugin then makes a layout,\n  or say which layers go where with {LAYOUT}"
    return f"{what}, with {shares}.\n  {instead}."

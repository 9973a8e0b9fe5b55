"""The looping placement: how many model chunks each pipeline rank holds.

Megatron's virtual pipeline stages are the paper's looping placement (stage = chunk * pp_size + pp_rank), so there is
nothing to place here: only the number of chunks to choose where the command line names none.
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..schedule import PipelineShape, breadth_first, simulate

# Few chunks mean few messages, many mean a small bubble: the first choice with less than this is taken.
BUBBLE_GOAL = 0.05
MOST_CHUNKS = 8


def has_chunks(args: Any) -> bool:
    """Whether the command line says how the layers are split into chunks."""
    names = ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
             "pipeline_model_parallel_layout", "hybrid_layer_pattern")  # fmt: skip
    return any(getattr(args, name, None) is not None for name in names)


def num_microbatches(args: Any) -> int:
    """Micro-batches of a full step, from arguments that Megatron has not validated yet."""
    model_parallel = (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * getattr(args, "context_parallel_size", 1)
    )
    per_microbatch = (args.micro_batch_size or 1) * max(1, args.world_size // model_parallel)
    return max(1, (args.global_batch_size or per_microbatch) // per_microbatch)


def choose_num_chunks(args: Any) -> tuple[int, str]:
    """(chunks per rank, why), or UserError where the layers cannot be placed."""
    pp_size, microbatches = args.pipeline_model_parallel_size, num_microbatches(args)
    counts = _layers_per_rank(args)
    choices = [
        chunks
        for chunks in range(2, max(2, min(MOST_CHUNKS, *counts)) + 1)
        if all(count % chunks == 0 for count in counts)
    ]
    if not choices:
        raise UserError(_no_choice(args, counts))
    for chunks in choices:
        bubble = predicted_bubble(PipelineShape(pp_size, chunks, microbatches))
        if bubble < BUBBLE_GOAL:
            break
    goal = "the fewest with a predicted bubble below" if bubble < BUBBLE_GOAL else "the most that divide; goal:"
    return chunks, f"{goal} {BUBBLE_GOAL:.0%} of the step ({bubble:.1%} with {microbatches} micro-batches)"


def predicted_bubble(shape: PipelineShape) -> float:
    """Of equal stages, backward twice as long as forward, without a network; a fraction of the step."""
    return simulate(breadth_first(shape), shape).bubble_fraction


def _layers_per_rank(args: Any) -> list[int]:
    """Layers on each pipeline rank, embedding and loss counted where Megatron counts them."""
    pp_size = args.pipeline_model_parallel_size
    first, last = (getattr(args, f"decoder_{end}_pipeline_num_layers", None) for end in ("first", "last"))
    total = args.num_layers + sum(
        bool(getattr(args, f"account_for_{end}_in_pipeline_split", False)) for end in ("embedding", "loss")
    )
    middle_ranks = pp_size - (first is not None) - (last is not None)
    middle = total - (first or 0) - (last or 0)
    if middle_ranks and (middle < middle_ranks or middle % middle_ranks):
        raise UserError(
            f"{total} layers cannot be shared out evenly to {pp_size} pipeline ranks"
            f"{f' with {first} on the first' if first else ''}{f' and {last} on the last' if last else ''}.\n"
            f"  Use --num-layers {_up(total, 2 * pp_size)} or another --pipeline-model-parallel-size,\n"
            "  or say which layers go where with --pipeline-model-parallel-layout."
        )
    return [each for each in (first, last) if each is not None] + [middle // middle_ranks] * bool(middle_ranks)


def _no_choice(args: Any, counts: list[int]) -> str:
    pp_size = args.pipeline_model_parallel_size
    smaller = [size for size in range(pp_size - 1, 1, -1) if args.num_layers % (2 * size) == 0]
    instead = f", or --pipeline-model-parallel-size {smaller[0]}" if smaller else ""
    return (
        f"--pipeline-schedule breadth-first needs at least 2 model chunks per rank, but {args.num_layers} layers on "
        f"{pp_size} pipeline ranks leave {' or '.join(map(str, sorted(set(counts))))} per rank, "
        f"which no number from 2 to {MOST_CHUNKS} divides.\n"
        f"  Use --num-layers {_up(args.num_layers, 2 * pp_size)}{instead},\n"
        "  or say which layers go where with --pipeline-model-parallel-layout."
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

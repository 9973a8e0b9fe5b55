"""Place the layers before Megatron reads the command line: by the plugin's rules, checked by Megatron's parsers.

The rules stand in schedule/model/: the planner places the layers of a job by the same ones.
"""

from typing import Any

from ...console.errors import UserError
from ...schedule.model.chunks import LAYOUT
from ...schedule.model.layout import layout_of
from ...schedule.model.pattern import is_hybrid, place_pattern
from ...schedule.model.placement import place_layers
from .batches import microbatch_counts
from .hybrid import check_experts, check_pattern


def place(args: Any) -> list[str]:
    """Set what the command line leaves open and return a line about it; UserError if the layers cannot be placed."""
    microbatches, own_layout = microbatch_counts(args)[-1], getattr(args, "pipeline_model_parallel_layout", None)
    if is_hybrid(args):
        check_pattern(args)
        cut = place_pattern(args, microbatches)
        check_experts(args)
        return cut
    lines = place_layers(args, microbatches)
    if own_layout is not None:
        _check_layout(own_layout, args.pipeline_model_parallel_size)
    return lines


def _check_layout(layout: Any, pp_size: int) -> None:
    """Check letters and number of stages; layers are counted when Megatron knows how many there must be."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        PipelineParallelLayerLayout(layout, pp_size)
    except AssertionError as error:  # how Megatron refuses
        raise UserError(
            f"{LAYOUT} {layout}: {' '.join(str(error).split())}.\n"
            f"  Give a multiple of {pp_size} stages, for example {layout_of([2] * 2 * pp_size)}, or leave it out."
        ) from None

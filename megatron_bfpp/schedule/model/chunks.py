"""How many model chunks a rank gets: the flags that say it, and the choice where none does."""

from collections.abc import Callable, Iterable
from typing import Any

from ...console.errors import UserError
from ..ir import PipelineShape

BUBBLE_GOAL = 0.05  # few chunks mean few messages, many a small bubble: the first choice with less than this is taken
MOST_CHUNKS = 8

CHUNKS, LAYERS, LAYOUT = FLAGS = (
    "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
)
# Flags with which the user says how many layers the first and the last rank get. Megatron wants the rest to divide.
SHARES = (
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
NEEDS_2 = "--pipeline-schedule breadth-first needs at least 2 model chunks per rank"


def name_of(flag: str) -> str:
    """Return the name of a flag's argument."""
    return flag.removeprefix("--").replace("-", "_")


def given(args: Any, flags: Iterable[str]) -> list[str]:
    """Return those of the flags that have a value."""
    values = {flag: getattr(args, name_of(flag), None) for flag in flags}
    return [flag for flag, value in values.items() if value is not None and value is not False]


def check_chunks(chunks: int | None, pp_size: int) -> None:
    """Refuse fewer than 2 chunks, with which Megatron would silently run another schedule."""
    if chunks is None or chunks < 2:
        raise UserError(
            f"{NEEDS_2}, but the layers are split into {chunks or 1}.\n"
            f"  Use {CHUNKS} 2 or more, or a {LAYOUT} with {2 * pp_size} or more stages."
        )


def predicted_bubble(shape: PipelineShape) -> float:
    """Return the bubble of equal stages without a network, a fraction of the step.

    `simulate` gives the same. In closed form, because the choice of chunks tries up to seven shapes, for the largest of
    which the simulator takes seconds.
    """
    most = max(shape.num_microbatches, shape.pp_size)
    step = (shape.num_chunks - 1) * most + shape.num_microbatches + shape.pp_size - 1
    return 1 - shape.num_chunks * shape.num_microbatches / step


def idle_part(pp_size: int, microbatches: int, loads: list[float]) -> float:
    """Predict the part of a step in which ranks are idle, with stages of these loads in order.

    A chunk takes the time of its longest stage, whichever rank has it.
    """
    chunks = len(loads) // pp_size
    longest = sum(max(loads[chunk * pp_size : (chunk + 1) * pp_size]) for chunk in range(chunks))
    bubble = predicted_bubble(PipelineShape(pp_size, chunks, microbatches))
    return 1 - (1 - bubble) * sum(loads) / (pp_size * longest)


def fewest_that_suffice(pp_size: int, microbatches: int, most: int, loads_of: Callable[[int], list[float]]) -> int:
    """Return the fewest chunks per rank, from 2 to `most`, that leave ranks idle for less than the goal.

    The number with the least idle time where none does. loads_of: of the stages with so many chunks.
    """
    idle: dict[int, float] = {}
    for chunks in range(2, min(MOST_CHUNKS, most) + 1):
        idle[chunks] = idle_part(pp_size, microbatches, loads_of(chunks))
        if idle[chunks] < BUBBLE_GOAL:
            return chunks
    return min(idle, key=lambda chunks: idle[chunks])

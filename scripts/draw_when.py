"""Draws when breadth-first wins and when not: what the simulator predicts for four schedules in five settings.

    python scripts/draw_when.py docs/images/when.svg

The settings are rows of the table of `bfpp bench --set full`, which measures them with real processes on an emulated
network. A message takes `hop` of latency and `transfer` of size / bandwidth, in forwards of a chunk; `reduction` counts
the backwards of a chunk, `gather` its forwards.
"""

import sys

from megatron_bfpp.bench.case import Case
from megatron_bfpp.bench.results import Result, lower_bound_s
from megatron_bfpp.console.files import write_whole
from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.timeline.bars import bars

WORDS = ("1f1b", "interleaved", "interleaved-grouped", "breadth-first")
SETTINGS = (  # what a reader sees, P, V, M, hop, transfer, reduction, gather
    ("no network at all", 4, 4, 8, 0.0, 0.0, 0.0, 0.0),
    ("slow messages", 8, 4, 16, 0.5, 0.0, 0.0, 0.0),
    ("slow and large messages", 8, 4, 16, 0.25, 0.25, 0.0, 0.0),
    ("slow reductions", 4, 4, 8, 0.5, 0.0, 1.0, 0.0),
    ("reductions and gathers", 4, 4, 8, 0.5, 0.0, 0.5, 0.5),
)


def ratios(shape: PipelineShape, costs: Costs) -> dict[str, float]:
    """Return the predicted step time of each schedule over the lower bound of the shape."""
    bound = lower_bound_s(shape, costs)
    return {word: Result(word, Case(shape, costs), []).predicted_s / bound for word in WORDS}


def settings() -> list[tuple[list[str], dict[str, float]]]:
    """Return the lines below each group of bars, and its ratios."""
    found = []
    for name, ranks, chunks, count, hop, transfer, reduction, gather in SETTINGS:
        shape = PipelineShape(ranks, chunks, count)
        costs = Costs(hop=hop, transfer=transfer, reduction=2 * count * reduction, gather=count * gather)
        times = {"hop": hop, "transfer": transfer, "reduction": reduction, "gather": gather}
        given = [f"{what} {time:g}" for what, time in times.items() if time]
        lines = [
            name,
            f"{ranks} ranks x {chunks} chunks, M {count}",
            " + ".join(given[:2]),
            " ".join(f"+ {each}" for each in given[2:]),
        ]
        found.append(([line for line in lines if line], ratios(shape, costs)))
    return found


def main(path: str) -> None:
    drawing = bars(
        "How much longer a step takes than the lower bound of its pipeline",
        "Predicted by the simulator, not measured on GPUs; shorter is better",
        settings(),
        "M: micro-batches of a step. hop, transfer: latency of a message and its size / bandwidth, in forwards of a "
        "chunk. reduction, gather: of a chunk, in its M backwards and in its M forwards.",
    )
    write_whole(path, drawing.svg(), "PATH")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The layout of layers that cannot be shared out evenly, in Megatron's notation (--pipeline-model-parallel-layout)."""

from collections.abc import Sequence
from itertools import groupby

MOST_RUNS = 20  # runs of stages with the same number of layers that a line names before it stops


def layers_of_stages(num_layers: int, pp_size: int, num_chunks: int, mtp_layers: int = 0) -> list[int]:
    """Share the decoder layers out to the stages, in order, at least one each, as evenly as possible.

    The embedding on the first stage, the loss and the MTP layers on the last one count as a layer each. Where some
    stages must get one more than others, they share chunks: a chunk takes the time of its longest stage, whichever rank
    has it.
    """
    stages = range(pp_size * num_chunks)
    if num_layers < len(stages):
        raise ValueError(f"{num_layers} layers for {len(stages)} stages: every stage holds one at least")
    other = other_layers(len(stages), mtp_layers)
    level = (num_layers + sum(other)) // len(stages)
    while sum(max(1, level - held) for held in other) > num_layers:
        level -= 1
    layers = [max(1, level - held) for held in other]
    loads = [count + held for count, held in zip(layers, other)]
    longer = {stage // pp_size for stage in stages if loads[stage] > level}
    can_take = [stage for stage in stages if loads[stage] == level]
    can_take.sort(key=lambda stage: stage // pp_size not in longer)  # stable: otherwise in the order of stages
    for stage in can_take[: num_layers - sum(layers)]:
        layers[stage] += 1
    return layers


def other_layers(num_stages: int, mtp_layers: int) -> list[int]:
    """Return the load of every stage beside its decoder layers, counted in layers."""
    return [1] + [0] * (num_stages - 2) + [1 + mtp_layers]


def layout_of(layers: Sequence[int], mtp_layers: int = 0) -> str:
    """Return the layout that gives every stage its layers, written short: Et*3|(t*4|)*14t*3L."""
    first, *middle, last = (_times("t", count) for count in layers)
    runs = [(stage, len(list(same))) for stage, same in groupby(middle)]
    stages = "".join(f"{stage}|" if count == 1 else f"({stage}|)*{count}" for stage, count in runs)
    return f"E{first}|{stages}{last}{_times('m', mtp_layers)}L"


def _times(layer: str, count: int) -> str:
    return layer * count if count < 2 else f"{layer}*{count}"


def runs_of(counts: Sequence[int], most: int = MOST_RUNS) -> str:
    """Return numbers in a row, written short: 3 4*14 3."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    text = " ".join(f"{count}*{times}" if times > 1 else str(count) for count, times in runs[:most])
    return text + " ..." * (len(runs) > most)

"""Where the search places the layers: evenly, as the plugin does, or so that the stage with the loss has fewer."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from ...schedule.model.chunks import LAYOUT, MOST_CHUNKS
from ...schedule.model.layout import layers_of_stages, layout_of
from ...schedule.model.partition import cuts
from ...schedule.model.pattern import PATTERN, costs_of, segments_of
from .gpt import GPT

__all__ = ["Placing", "balanced", "placings"]

_WORTH = 0.75  # of a layer: the time of the ends from which on a layout spares the last stage some layers


class Placing(NamedTuple):
    """Decoder layers of each stage in order, () where they divide evenly, and the flags that say so."""

    layers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


def placings(gpt: GPT, pp: int, chunks: int, is_breadth_first: bool) -> Iterator[Placing]:
    """Yield the even placement where there is one, else the plugin's; and a layout that spares the last stage some.

    Megatron's own schedules take what does not divide in a layout only; the plugin makes one of the number of chunks.
    A hybrid model has its pattern cut by the cost of its layers, as the plugin cuts it.
    """
    stages = pp * chunks
    if gpt.pattern and stages > 1:
        yield from _segments(gpt, pp, chunks)
        return
    is_even, ends = gpt.num_layers % stages == 0, gpt.ends_in_layers
    if is_even:
        yield Placing()
    layout = balanced(gpt.num_layers, stages, ends) if not is_even or (stages > 1 and ends >= _WORTH) else None
    if is_breadth_first and not is_even and gpt.num_layers >= stages:
        # The plugin counts loss and MTP as a layer each. Where that is right, no other layout is better; where it is
        # wrong by more than one, another is.
        wrong = abs(round(ends) - 1 - gpt.mtp_layers)
        if wrong <= 1 or layout is None:
            yield Placing(tuple(layers_of_stages(gpt.num_layers, pp, chunks, gpt.mtp_layers)))
        layout = None if wrong == 0 else layout
    if layout is not None and len(set(layout)) > 1:  # else it is the even one
        yield Placing(layout, (LAYOUT, layout_of(layout, gpt.mtp_layers)))


def _segments(gpt: GPT, pp: int, chunks: int) -> Iterator[Placing]:
    if chunks == 1 and gpt.num_layers % pp == 0:  # without | Megatron shares the layers out evenly, to ranks alone
        yield Placing()
    most = max(chunks, MOST_CHUNKS)
    found = gpt.once(("segments", pp, most), lambda: tuple(islice(cuts(_costs(gpt), pp), most)))
    if chunks <= len(found):
        layers = found[chunks - 1]
        text = segments_of(gpt.pattern, layers) + f"/{gpt.mtp_pattern}" * gpt.mtp_layers
        yield Placing(tuple(layers), (PATTERN, text))


def _costs(gpt: GPT) -> list[int]:
    return costs_of(gpt.arguments("none"), PATTERN, gpt.pattern, [gpt.mtp_pattern] * gpt.mtp_layers)[0]


def balanced(layers: int, stages: int, ends: float) -> tuple[int, ...] | None:
    """Return the layers of each stage, of which the last also has ends as long as `ends` layers.

    The last has as many fewer, and the first ones have fewer where they do not divide: they keep most activations.
    None where a stage before the last would have none.
    """
    extra = round(ends)
    most = -(-(layers + extra) // stages)
    last = max(0, most - extra)
    each, rest = divmod(layers - last, stages - 1)
    if each == 0:
        return None
    return (*[each] * (stages - 1 - rest), *[each + 1] * rest, last)

"""Planned steps as one Chrome trace, in the lanes of a measured one (document.py). Standard library only."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from ..schedule import Action, Span
from ..schedule.ir import RECEIVES, SENDS
from ..schedule.replay import Prediction
from .document import in_chromes_format, lanes, names, whole
from .intervals import ACTION, DP, P2P, Interval

FORMAT = "megatron_bfpp planned trace 1"  # which bfpp trace does not take for a measured one
_NS = 1e6  # of a forward, which is drawn as 1 ms


def document(planned: list[tuple[str, Prediction]]) -> dict[str, Any]:
    """Return the trace, JSON-able. The ranks of several schedules follow each other, on one time axis."""
    events: list[dict[str, Any]] = []
    first = 0
    for name, predicted in planned:
        label = f"{name} " if len(planned) > 1 else ""
        ranks = [list(lanes(intervals)) for intervals in _intervals(predicted)]
        events += names(range(first, first + len(ranks)), label)
        events += in_chromes_format(ranks, predicted.shape, 0, 0, first, label)
        first += len(ranks)
    schedules = [{"name": name, "step": each.step_time, "bubble": each.bubble_fraction} for name, each in planned]
    return whole(events, {"format": FORMAT, "schedules": schedules})


def collectives(predicted: Prediction, pp_rank: int) -> Iterator[Span]:
    """Yield the gathers and reductions of a rank that take time, which run one after another."""
    free = 0.0
    for action, collective in predicted.collectives[pp_rank]:
        if collective.duration and collective.end is not None:
            yield Span(action, max(free, collective.launched), collective.end)
            free = collective.end


def _intervals(predicted: Prediction) -> list[list[Interval]]:
    """Return what each rank would have noted, but collectives from their beginning to their end."""
    ranks: list[list[Interval]] = [[] for _ in predicted.spans]
    shape = predicted.shape
    arrivals: list[dict[float, Action]] = [{} for _ in ranks]
    for each in predicted.messages:
        sender, receiver = shape.rank_of(each.send.stage), shape.rank_of(each.receive.stage)
        ranks[sender].append(_interval(each.send, each.sent, each.sent))  # the launch: several can be under way
        ranks[receiver].append(_interval(each.receive, each.posted, each.arrived))
        arrivals[receiver][each.arrived] = each.receive
        arrivals[sender].setdefault(each.left, each.send)
    for rank, spans in enumerate(predicted.spans):
        for span in collectives(predicted, rank):
            ranks[rank].append(_interval(*span))
            arrivals[rank].setdefault(span.end, span.action)
        ranks[rank] += [_interval(*span) for span in spans]
        ranks[rank] += _waits(spans, arrivals[rank])
        ranks[rank].sort(key=lambda interval: interval.start)
    return ranks


def _waits(spans: list[Span], arrivals: dict[float, Action]) -> Iterator[Interval]:
    """Yield where a rank stands still until something that it needs is there."""
    for start, end in [(0.0, spans[0].start), *((before.end, span.start) for before, span in pairwise(spans))]:
        if end > start and end in arrivals:
            action = arrivals[end]
            yield _interval(action, start, end, P2P if action.op in SENDS | RECEIVES else DP)


def _interval(action: Action, start: float, end: float, kind: str = ACTION) -> Interval:
    return Interval(action, kind, round(start * _NS), round(end * _NS))

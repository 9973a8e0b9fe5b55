"""Planned steps as one Chrome trace, in the lanes of a measured one (timeline/document.py); a forward of a chunk is 1 ms. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from ..schedule import Action, Span
from ..schedule.ir import RECEIVES, SENDS
from ..schedule.replay import Prediction
from .document import Trace
from .intervals import ACTION, DP, P2P, Interval

FORMAT = "megatron_bfpp planned trace 1"  # which bfpp trace does not take for a measured one
_NS = 1e6  # of a forward


def document(planned: list[tuple[str, Prediction]]) -> dict[str, Any]:
    """JSON-able. The ranks of several schedules follow each other, on one time axis."""
    events: list[dict[str, Any]] = []
    for name, predicted in planned:
        trace = Trace(predicted.shape.pp_size, {})
        trace.add(0, predicted.shape, _intervals(predicted))
        first = 1 + max((event["pid"] for event in events), default=-1)
        for event in trace.document()["traceEvents"]:
            if event["name"] == "process_name" and len(planned) > 1:
                event["args"]["name"] = f"{name} {event['args']['name']}"
            if event["name"] == "process_sort_index":
                event["args"]["sort_index"] += first
            if "id" in event:  # of an arrow
                event["id"] = f"{name} {event['id']}"
            events.append({**event, "pid": event["pid"] + first})
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"]))
    schedules = [{"name": name, "step": each.step_time, "bubble": each.bubble_fraction} for name, each in planned]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"format": FORMAT, "schedules": schedules}}


def _intervals(predicted: Prediction) -> list[list[Interval]]:
    """Per rank: its actions as a run would have noted them, and collectives from their beginning to their end."""
    ranks: list[list[Interval]] = [[] for _ in predicted.spans]
    shape = predicted.shape
    arrivals: dict[int, dict[float, str]] = {rank: {} for rank in range(shape.pp_size)}
    for each in predicted.messages:
        sender, receiver = shape.rank_of(each.send.stage), shape.rank_of(each.receive.stage)
        ranks[sender].append(_interval(str(each.send), each.sent, each.sent))  # the launch: several can be under way
        ranks[receiver].append(_interval(str(each.receive), each.posted, each.arrived))
        arrivals[receiver][each.arrived] = str(each.receive)
        arrivals[sender].setdefault(each.left, str(each.send))
    for rank, log in enumerate(predicted.collectives):
        free = 0.0
        for action, collective in log:
            if collective.duration and collective.end is not None:
                ranks[rank].append(_interval(str(action), max(free, collective.launched), collective.end))
                arrivals[rank].setdefault(collective.end, str(action))
                free = collective.end
    for rank, spans in enumerate(predicted.spans):
        ranks[rank] += [_interval(str(span.action), span.start, span.end) for span in spans]
        ranks[rank] += _waits(spans, arrivals[rank])
        ranks[rank].sort(key=lambda interval: interval.start)
    return ranks


def _waits(spans: list[Span], arrivals: dict[float, str]) -> Iterator[Interval]:
    """Where a rank stands still until something it needs is there."""
    for start, end in [(0.0, spans[0].start), *((before.end, span.start) for before, span in pairwise(spans))]:
        if end > start and end in arrivals:
            name = arrivals[end]
            kind = P2P if Action.parse(name).op in SENDS | RECEIVES else DP
            yield Interval(name, kind, round(start * _NS), round(end * _NS))


def _interval(name: str, start: float, end: float) -> Interval:
    return Interval(name, ACTION, round(start * _NS), round(end * _NS))

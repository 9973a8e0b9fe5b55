"""Reads the steps of a trace.json (document.py) as timelines, with what the time of each rank was spent on.

Of a step, which lasts from the first event of any rank to the last one:
    busy          computing
    exposed p2p   waiting for messages, or for sends before their tensors are given up
    exposed dp    waiting for gathers and reductions, and launching them
    bubble        1 - busy / step; of all ranks 1 - sum of busy / (pp_size * step)
The rest is the host's: launches, and Megatron's own work between two actions. Times are in milliseconds, for readers.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..console.errors import UserError
from ..schedule import Action, Op, PipelineShape, ScheduleError, Span, Timeline, simulate
from .document import COMPUTE_LANE, FORMAT, REPLICAS, WAITING, Event
from .intervals import DP, P2P, Interval

_MS = 1e-6  # of a nanosecond


@dataclass(frozen=True)
class Measured(Timeline):
    """A measured step: a timeline, with waits."""

    length: float = 0.0
    waits: list[list[Interval]] = field(default_factory=list)  # [pp_rank]
    busy: list[float] = field(default_factory=list)
    exposed_p2p: list[float] | None = None  # None: unknown, under Megatron's own loops
    exposed_dp: list[float] = field(default_factory=list)

    @property
    def step_time(self) -> float:
        return self.length

    @property
    def bubble_fraction(self) -> float:
        return 1 - sum(self.busy) / (self.shape.pp_size * self.length)

    def bubble_of(self, pp_rank: int) -> float:
        return 1 - self.busy[pp_rank] / self.length

    def action_time(self, op: Op) -> float | None:
        """Return the median duration of the compute actions of a kind; None where there is none."""
        times = [span.end - span.start for spans in self.spans for span in spans if span.action.op is op]
        return median(times) if times else None

    def planned(self) -> Timeline:
        """Simulate the same order with equal stages of this step's median durations, and without a network."""
        order = [[span.action for span in spans] for spans in self.spans]
        forward, whole = self.action_time(Op.F) or 1.0, self.action_time(Op.B) or 1.0
        inputs, weights = self.action_time(Op.I), self.action_time(Op.W)
        if inputs is None or weights is None:
            return simulate(order, self.shape, forward, whole)
        return simulate(order, self.shape, forward, inputs + weights, weights=weights)


def measure(shape: PipelineShape, ranks: list[list[Event]], waits_are_known: bool) -> Measured:
    """Return what the events of a step, one list for each pp_rank, say."""
    first = min(event.start for events in ranks for event in events)
    last = max(event.end for events in ranks for event in events)

    def times(event: Event) -> tuple[float, float]:
        return (event.start - first) * _MS, (event.end - first) * _MS

    spans = [[Span(each.action, *times(each)) for each in events if each.lane == COMPUTE_LANE] for events in ranks]
    waits = [
        [Interval(each.action, each.category[len("wait-") :], *times(each)) for each in events if each.lane == WAITING]
        for events in ranks
    ]
    gates = [
        [times(each) for each in events if each.lane == REPLICAS or each.category == f"wait-{DP}"] for events in ranks
    ]
    p2p = [sum(each.end - each.start for each in rank if each.kind == P2P) for rank in waits]
    return Measured(
        shape,
        spans,
        length=(last - first) * _MS,
        waits=waits,
        busy=[sum(event.busy for event in events if event.lane == COMPUTE_LANE) * _MS for events in ranks],
        exposed_p2p=p2p if waits_are_known else None,
        exposed_dp=[_covered(each) for each in gates],
    )


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union: a launch may contain a wait."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def read(path: str) -> dict[str, Any]:
    """Return the document of a trace.json; raise UserError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON, or was cut off: {error}.") from None
    other = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(other, dict) or other.get("format") != FORMAT:
        raise UserError(
            f"{path} is no trace of megatron_bfpp.\n  Name a trace.json that --bfpp-trace-steps has written."
        )
    return dict(document)


def steps_of(document: dict[str, Any]) -> dict[int, Measured]:
    """Return the measured steps by their number."""
    with damage_reported():
        other = document["otherData"]
        shapes = {
            each["step"]: PipelineShape(other["pp"], each["chunks"], each["microbatches"]) for each in other["steps"]
        }
        events: dict[int, dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
        for each in document["traceEvents"]:
            if each["ph"] == "X":
                events[each["args"]["step"]][each["pid"]].append(_event(each))
        return {step: _measured(shape, events[step], other["waits"]) for step, shape in shapes.items()}


def _measured(shape: PipelineShape, events: dict[int, list[Event]], waits_are_known: bool) -> Measured:
    count = sum(map(len, events.values()))
    if 2 * shape.num_stages * shape.num_microbatches > count:  # one damaged number would take all memory
        raise ValueError(f"{count} events are too few for {shape}")
    return measure(shape, [events[rank] for rank in range(shape.pp_size)], waits_are_known)


def _event(event: dict[str, Any]) -> Event:
    if event["tid"] == WAITING and event["cat"] not in (f"wait-{P2P}", f"wait-{DP}"):
        raise ValueError(f"{event['cat']!r} is no kind of wait")
    start, duration, busy = (round(1000 * us) for us in (event["ts"], event["dur"], event["args"].get("busy_us", 0)))
    return Event(Action.parse(event["name"]), event["tid"], event["cat"], start, start + duration, busy)


@contextmanager
def damage_reported() -> Iterator[None]:
    """Raise UserError for whatever a file with missing fields, other types or impossible numbers leads to."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, ScheduleError):  # an order that no run can have had
            raise UserError(f"the trace is damaged: {error}") from None
        raise UserError(f"the trace is damaged: {type(error).__name__} {error}.") from None

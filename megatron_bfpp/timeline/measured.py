"""Reads the steps of a trace.json (document.py) as timelines, with what the time of each rank was spent on.

Of a step, which lasts from the first event of any rank to the last one:
    busy          computing
    exposed p2p   waiting for messages, or for sends before their tensors are given up
    exposed dp    waiting for gathers and reductions, and launching them
    bubble        1 - busy / step; of all ranks 1 - sum of busy / (pp_size * step)
What is left is the host's: launches, and Megatron's own work between two actions. Times in milliseconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..console.errors import UserError
from ..schedule import Action, Op, PipelineShape, ScheduleError, Span, Timeline, simulate

FORMAT = "megatron_bfpp trace 1"


@dataclass(frozen=True)
class Wait:
    """A time in which a rank stood still: what for ("p2p", "dp"), and the action that it waited for."""

    kind: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Measured(Timeline):
    """A measured step: a timeline, with waits."""

    length: float = 0.0
    waits: list[list[Wait]] = field(default_factory=list)  # [pp_rank]
    busy: list[float] = field(default_factory=list)
    exposed_p2p: list[float] | None = None  # None: not known, under Megatron's own loops
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
        """The median duration of a forward or backward; None where there is none."""
        times = [span.end - span.start for spans in self.spans for span in spans if span.action.op is op]
        return median(times) if times else None

    def planned(self) -> Timeline:
        """The same order, with equal stages of this step's median durations, and without a network."""
        order = [[span.action for span in spans] for spans in self.spans]
        forward, backward = self.action_time(Op.F), self.action_time(Op.B)
        return simulate(order, self.shape, forward or 1.0, backward or 1.0)


def read(path: str) -> dict[str, Any]:
    """The document of a trace.json; UserError for anything else."""
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
    """The measured steps by their number."""
    other, events = document["otherData"], defaultdict(list)
    steps: dict[int, Measured] = {}
    with damage_told():
        for event in document["traceEvents"]:
            if event["ph"] == "X":
                events[event["args"]["step"]].append(event)
        for about in other["steps"]:
            shape = PipelineShape(other["pp"], about["chunks"], about["microbatches"])
            steps[about["step"]] = _measured(shape, events[about["step"]], other["waits"])
    return steps


@contextmanager
def damage_told() -> Iterator[None]:
    """UserError for whatever a file with fields missing, of other types, or with impossible numbers leads to."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ScheduleError | UserError):
            raise
        raise UserError(f"the trace is damaged: {type(error).__name__} {error}.") from None


def _measured(shape: PipelineShape, events: list[dict[str, Any]], waits_are_known: bool) -> Measured:
    size = shape.pp_size
    if 2 * shape.num_stages * shape.num_microbatches > len(events):  # one damaged number would take all memory
        raise ValueError(f"{len(events)} events are too few for {shape}")
    start = min(event["ts"] for event in events)
    length = (max(event["ts"] + event["dur"] for event in events) - start) / 1000
    spans: list[list[Span]] = [[] for _ in range(size)]
    waits: list[list[Wait]] = [[] for _ in range(size)]
    busy, gates = [0.0] * size, [[] for _ in range(size)]  # type: tuple[list[float], list[list[tuple[float, float]]]]
    for event in events:
        rank, begin = event["pid"], (event["ts"] - start) / 1000
        end = begin + event["dur"] / 1000
        kind = event["cat"]
        if kind == "compute":
            spans[rank].append(Span(Action.parse(event["name"]), begin, end))
            busy[rank] += event["args"]["busy_us"] / 1000
        elif kind.startswith("wait-"):
            waits[rank].append(Wait(kind.removeprefix("wait-"), event["name"], begin, end))
        if kind in ("wait-dp", "data-parallel"):
            gates[rank].append((begin, end))
    p2p = [sum(each.end - each.start for each in rank if each.kind == "p2p") for rank in waits]
    exposed_dp = [_covered(each) for each in gates]
    return Measured(
        shape,
        spans,
        length=length,
        waits=waits,
        busy=busy,
        exposed_p2p=p2p if waits_are_known else None,
        exposed_dp=exposed_dp,
    )


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union: a launch may contain a wait."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered

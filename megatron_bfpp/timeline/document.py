"""The recorded steps of all ranks of a pipeline as one Chrome trace, for Perfetto. Standard library only.

A process per pp_rank; in each, lanes without overlap:
    compute        2F0, from the end of the waits that it begins with; args.busy_us leaves out the waits within it
    waiting        2RECV_F0, 2SEND_F0, 1UNSHARD ...: what the rank stood still for
    sends          2SEND_F0: the launch
    receives       2RECV_F0: until the rank had it, from its posting or from the receive before, whichever is later
    data-parallel  1UNSHARD, 1REDUCE_GRAD ...: the launch
An arrow leads from each send to its receive. Events are sorted by time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..schedule.ir import COMPUTE, RECEIVES, SENDS, Action, PipelineShape
from ..schedule.lower import peer
from .intervals import ACTION, DP, Interval

FORMAT = "megatron_bfpp trace 1"
LANES = ("compute", "waiting", "sends", "receives", "data-parallel")
COMPUTE_LANE, WAITING, SENDING, RECEIVING, REPLICAS = range(len(LANES))
_ORDER = {"M": 0, "X": 1, "s": 2, "f": 3}  # of events of one moment

Event = dict[str, Any]
Arrows = dict[tuple[int, str], tuple[int, float]]  # step, name of the send -> pp_rank, microseconds


@dataclass
class Trace:
    """What has been recorded so far. Times: nanoseconds on the clock of the first rank."""

    pp_size: int
    about: dict[str, Any]  # what runs, for the reader
    _events: list[Event] = field(default_factory=list)
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _zero: int | None = None

    def add(self, step: int, shape: PipelineShape, ranks: list[list[Interval]], **about: Any) -> None:
        """A step: per pp_rank its intervals, sorted. about: of this step, for the reader."""
        if self._zero is None:
            self._zero = min(interval.start for intervals in ranks for interval in intervals)
        sent: Arrows = {}
        received: Arrows = {}
        for pp_rank, intervals in enumerate(ranks):
            for event in _lanes(intervals, self._zero):
                event |= {"pid": pp_rank, "args": {"step": step, **event.get("args", {})}}
                self._events.append(event)
                if event["tid"] == SENDING:
                    sent[step, event["name"]] = pp_rank, event["ts"]
                if event["tid"] == RECEIVING:
                    send = peer(Action.parse(event["name"]), shape)
                    received[step, str(send)] = pp_rank, event["ts"] + event["dur"]
        self._events += _arrows(sent, received, len(self._steps))
        self._steps.append({"step": step, "chunks": shape.num_chunks, "microbatches": shape.num_microbatches, **about})

    def document(self) -> dict[str, Any]:
        """The trace in Chrome's format, JSON-able."""
        named = [event for pp_rank in range(self.pp_size) for event in _names(pp_rank)]
        events = sorted(self._events, key=lambda event: (event["ts"], _ORDER[event["ph"]]))
        other = {"format": FORMAT, "pp": self.pp_size, **self.about, "steps": self._steps}
        return {"traceEvents": named + events, "displayTimeUnit": "ms", "otherData": other}


def _names(pp_rank: int) -> Iterator[Event]:
    about = {"ph": "M", "pid": pp_rank, "ts": 0}
    yield {**about, "name": "process_name", "tid": 0, "args": {"name": f"pp_rank {pp_rank}"}}
    yield {**about, "name": "process_sort_index", "tid": 0, "args": {"sort_index": pp_rank}}
    for lane, name in enumerate(LANES):
        yield {**about, "name": "thread_name", "tid": lane, "args": {"name": name}}
        yield {**about, "name": "thread_sort_index", "tid": lane, "args": {"sort_index": lane}}


def _lanes(intervals: list[Interval], zero: int) -> Iterator[Event]:
    """The events of a rank. A wait stands in the list behind the action that it is a part of, as it begins later."""
    actions = [each for each in intervals if each.kind == ACTION]
    waits = [each for each in intervals if each.kind != ACTION]
    following = 0
    for wait in waits:
        yield _event(WAITING, wait.name, f"wait-{wait.kind}", wait.start, wait.end, zero)
    yield from _receives(actions, waits, zero)
    for each in actions:
        action = Action.parse(each.name)
        if action.op in COMPUTE:
            while following < len(waits) and waits[following].start < each.start:
                following += 1
            start, waited = each.start, 0
            while following < len(waits) and waits[following].start < each.end:
                wait = waits[following]
                if wait.kind == DP:
                    waited += wait.end - wait.start
                else:  # messages are waited for before anything is computed
                    start, waited = wait.end, 0
                following += 1
            event = _event(COMPUTE_LANE, each.name, "compute", start, each.end, zero)
            yield event | {"args": {"busy_us": (each.end - start - waited) / 1000}}
        elif action.op in SENDS:
            yield _event(SENDING, each.name, "send", each.start, each.end, zero)
        elif action.op not in RECEIVES:
            yield _event(REPLICAS, each.name, "data-parallel", each.start, each.end, zero)


def _receives(actions: list[Interval], waits: list[Interval], zero: int) -> Iterator[Event]:
    """In the order in which the rank had them, which need not be that of the postings."""
    arrivals = {wait.name: wait.end for wait in waits}
    receives = [(arrivals.get(each.name, each.end), each) for each in actions if Action.parse(each.name).op in RECEIVES]
    free = 0
    for end, each in sorted(receives):
        yield _event(RECEIVING, each.name, "receive", max(each.start, free), end, zero)
        free = end


def _event(lane: int, name: str, category: str, start: int, end: int, zero: int) -> Event:
    times = {"ts": (start - zero) / 1000, "dur": (end - start) / 1000}
    return {"ph": "X", "name": name, "cat": category, "tid": lane, **times}


def _arrows(sent: Arrows, received: Arrows, step_index: int) -> Iterable[Event]:
    for number, key in enumerate(sorted(sent.keys() & received.keys())):
        common = {"name": key[1], "cat": "message", "id": f"{step_index}.{number}"}
        source, launched = sent[key]
        target, arrived = received[key]
        yield {**common, "ph": "s", "pid": source, "tid": SENDING, "ts": launched}
        # Just before the end: an arrow leads to the event that is under way.
        yield {**common, "ph": "f", "bp": "e", "pid": target, "tid": RECEIVING, "ts": max(launched, arrived - 0.001)}

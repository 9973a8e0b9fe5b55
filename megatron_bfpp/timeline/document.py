"""Steps of all ranks of a pipeline as a Chrome trace, for Perfetto. Standard library only.

A process per pp_rank; in each, lanes without overlap:
    compute        2F0, from the end of the waits that it begins with; args.busy_us leaves out the waits within it
    waiting        2RECV_F0, 2SEND_F0, 1UNSHARD ...: what the rank stood still for
    sends          2SEND_F0: the launch
    receives       2RECV_F0: until the rank had it, from its posting or from the receive before, whichever is later
    data-parallel  1UNSHARD, 1REDUCE_GRAD ...: the launch
An arrow leads from each send to its receive. Events are sorted by time. The format is a list of plain dicts, written by
hand: a library would only rename its keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..schedule.ir import COMPUTE, RECEIVES, SENDS, Action, PipelineShape, peer
from .intervals import ACTION, DP, Interval

FORMAT = "megatron_bfpp trace 1"
LANES = ("compute", "waiting", "sends", "receives", "data-parallel")
COMPUTE_LANE, WAITING, SENDING, RECEIVING, REPLICAS = range(len(LANES))
_ORDER = {"M": 0, "X": 1, "s": 2, "f": 3}  # of events of one moment


class Event(NamedTuple):
    """An action or a wait in its lane; nanoseconds. busy: of compute, its time without the waits within it."""

    action: Action
    lane: int
    category: str
    start: float
    end: float
    busy: float = 0


@dataclass
class Trace:
    """The steps recorded so far, on the clock of the first rank."""

    pp_size: int
    about: dict[str, Any]  # what runs, for the reader
    _events: list[dict[str, Any]] = field(default_factory=list)
    _steps: list[dict[str, Any]] = field(default_factory=list)
    _zero: float | None = None

    def add(self, step: int, shape: PipelineShape, ranks: list[list[Interval]], **about: Any) -> list[list[Event]]:
        """Add a step from the sorted intervals of each pp_rank and return their events. about: for the reader."""
        events = [list(lanes(intervals)) for intervals in ranks]
        if self._zero is None:
            self._zero = min(each.start for intervals in ranks for each in intervals)
        self._events += in_chromes_format(events, shape, step, self._zero, label=f"{len(self._steps)}.")
        self._steps.append({"step": step, "chunks": shape.num_chunks, "microbatches": shape.num_microbatches, **about})
        return events

    def document(self) -> dict[str, Any]:
        """Return the trace in Chrome's format, JSON-able."""
        other = {"format": FORMAT, "pp": self.pp_size, **self.about, "steps": self._steps}
        return whole([*names(range(self.pp_size)), *self._events], other)


def whole(events: list[dict[str, Any]], other: dict[str, Any]) -> dict[str, Any]:
    """Return the document of events in any order."""
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"], _ORDER[event["ph"]]))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def names(processes: range, label: str = "") -> Iterator[dict[str, Any]]:
    """Yield what names the processes, one for each pp_rank, and their lanes."""
    for pp_rank, process in enumerate(processes):
        about = {"ph": "M", "pid": process, "ts": 0}
        yield {**about, "name": "process_name", "tid": 0, "args": {"name": f"{label}pp_rank {pp_rank}"}}
        yield {**about, "name": "process_sort_index", "tid": 0, "args": {"sort_index": process}}
        for lane, name in enumerate(LANES):
            yield {**about, "name": "thread_name", "tid": lane, "args": {"name": name}}
            yield {**about, "name": "thread_sort_index", "tid": lane, "args": {"sort_index": lane}}


def lanes(intervals: list[Interval]) -> Iterator[Event]:
    """Yield the events of a rank. A wait follows the action that it is a part of, as it begins later."""
    actions = [each for each in intervals if each.kind == ACTION]
    waits = [each for each in intervals if each.kind != ACTION]
    for wait in waits:
        yield Event(wait.action, WAITING, f"wait-{wait.kind}", wait.start, wait.end)
    yield from _receives(actions, waits)
    following = 0
    for action, _, start, end in actions:
        if action.op in COMPUTE:
            while following < len(waits) and waits[following].start < start:
                following += 1
            waited = 0.0
            while following < len(waits) and waits[following].start < end:
                wait = waits[following]
                if wait.kind == DP:
                    waited += wait.end - wait.start
                else:  # messages are waited for before anything is computed
                    start, waited = wait.end, 0
                following += 1
            yield Event(action, COMPUTE_LANE, "compute", start, end, end - start - waited)
        elif action.op in SENDS:
            yield Event(action, SENDING, "send", start, end)
        elif action.op not in RECEIVES:
            yield Event(action, REPLICAS, "data-parallel", start, end)


def _receives(actions: list[Interval], waits: list[Interval]) -> Iterator[Event]:
    """Yield the receives in the order of their arrival, which need not be that of their posting."""
    arrivals = {wait.action: wait.end for wait in waits}
    receives = [(arrivals.get(each.action, each.end), each) for each in actions if each.action.op in RECEIVES]
    free = 0.0
    for end, each in sorted(receives):
        yield Event(each.action, RECEIVING, "receive", max(each.start, free), end)
        free = end


def in_chromes_format(
    ranks: list[list[Event]], shape: PipelineShape, step: int, zero: float, first: int = 0, label: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the events and arrows of a step; here actions become text, and nanoseconds since `zero` microseconds.

    first: the process of pp_rank 0. label: begins the ids of the arrows, which are unique in a file.
    """
    sent: dict[Action, dict[str, Any]] = {}
    received: dict[Action | None, dict[str, Any]] = {}
    for process, events in enumerate(ranks, first):
        for action, lane, category, start, end, busy in events:
            event: dict[str, Any] = {"ph": "X", "name": str(action), "cat": category, "pid": process, "tid": lane}
            event |= {"ts": (start - zero) / 1000, "dur": (end - start) / 1000, "args": {"step": step}}
            if lane == COMPUTE_LANE:
                event["args"]["busy_us"] = busy / 1000
            if lane == SENDING:
                sent[action] = event
            if lane == RECEIVING:
                received[peer(action, shape)] = event
            yield event
    for number, action in enumerate(sorted(sent.keys() & received.keys())):
        common = {"name": str(action), "cat": "message", "id": f"{label}{number}"}
        source, target = sent[action], received[action]
        yield {**common, "ph": "s", "pid": source["pid"], "tid": SENDING, "ts": source["ts"]}
        # Just before the end: an arrow leads to the event that is under way.
        end = max(source["ts"], target["ts"] + target["dur"] - 0.001)
        yield {**common, "ph": "f", "bp": "e", "pid": target["pid"], "tid": RECEIVING, "ts": end}

"""CUDA's and NCCL's rules as code: when the commands that the hosts of a pipeline launch run, or where they stop.

Independent of schedule/check.py and schedule/replay.py, which it is there to test. A programme is what the host of one
rank does, in order:
  - a `Command` enters a hardware queue of the device: a kernel, a send or receive, or a wait of a stream for an event,
    which is a command without duration;
  - a `HostMessage` is sent or received beside the device, as gloo does: it blocks nothing;
  - a `HostWait` stops the host until such a message has been taken, or until all that it has launched is complete.

The rules:
  - A hardware queue is a FIFO. Its first command starts once the command before it on its stream is complete and the
    events that it waits for have happened. One that cannot start blocks all behind it, whatever stream they are of.
    Once it has started it blocks nothing but its own stream. To record an event blocks nothing: with one queue, tensor
    parallelism overlaps its GEMMs with NCCL's kernels, whose launch ends with such a record.
  - Each stream has a hardware queue to itself, or shares one with others (CUDA_DEVICE_MAX_CONNECTIONS).
  - A send or receive that has started spins until its other end has started; `hop` later both are complete. The sends
    and receives of two ranks on one communicator are matched by their order alone.

No duration decides what waits for what: all of this is a graph, known before anything runs. The time of a step is its
longest path, and a deadlock is a circle in it.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, Self


class End(NamedTuple):
    """One end of a message."""

    communicator: Hashable
    peer: int
    is_send: bool
    content: Hashable = None  # which message it is, where the one who recorded it knows


@dataclass(eq=False, slots=True)
class Command:
    """What the host launches on a stream. after: commands of the same rank whose ends it waits for."""

    name: str
    stream: Hashable
    duration: float = 0.0
    after: Sequence[Self] = ()
    end: End | None = None  # of a send or receive


@dataclass(eq=False, slots=True)
class HostMessage:
    """One end of a message from host to host."""

    name: str
    end: End


@dataclass(eq=False, slots=True)
class HostWait:
    """The host stops. message: until its other end is there. None: until all that it has launched is complete, as in
    cudaDeviceSynchronize, cudaFree, the loading of a module, and the allocator before it tries again."""

    message: HostMessage | None = None

    @property
    def name(self) -> str:
        return "a device-wide wait" if self.message is None else f"the wait for {self.message.name}"


Entry = Command | HostMessage | HostWait
Programme = list[Entry]
Queue = Callable[[int, Hashable], Hashable]  # (pp_rank, stream) -> its hardware queue


class Hang(Exception):
    """No host and no device can go on. It lists what each rank cannot complete."""


class Mismatch(Exception):
    """A send is matched with the receive of another message."""


def own(pp_rank: int, stream: Hashable) -> Hashable:
    """Give every stream a hardware queue to itself."""
    return stream


def one(pp_rank: int, stream: Hashable) -> Hashable:
    """Give all streams of a rank one hardware queue: CUDA_DEVICE_MAX_CONNECTIONS=1."""
    return 0


def run(
    programmes: Sequence[Programme],
    hop: float = 0.0,
    queue: Queue = own,
    launch_cost: float = 0.0,
    launch_blocking: bool = False,
) -> list[list[float]]:
    """Return when each entry of each rank is complete; raise Hang where one never is.

    launch_cost: the host's time for a command. launch_blocking: CUDA_LAUNCH_BLOCKING=1, the host waits for each.
    """
    graph = _Graph(programmes, queue, launch_blocking)
    times = [0.0] * len(graph.before)
    for node in graph.order():
        entry = graph.entries[node // 3]
        cost = 0.0
        if isinstance(entry, Command):
            cost = (launch_cost, 0.0, entry.duration if entry.end is None else hop)[node % 3]
        times[node] = max([times[other] for other in graph.before[node]], default=0.0) + cost
    return [times[3 * first + COMPLETE : 3 * last : 3] for first, last in graph.bounds]


def step_time(programmes: Sequence[Programme], hop: float = 0.0, queue: Queue = own) -> float:
    """Return when the last entry is complete."""
    return max(map(max, run(programmes, hop, queue)))


def hanging_waits(programmes: Sequence[Programme], queue: Queue = own) -> list[list[int]]:
    """Return, for each rank, the places before which one device-wide wait would hang the step.

    A wait at place p makes all that a rank launches from p on wait for all that it launched before. That closes a
    circle if some of the earlier waits for some of the later already. So each node keeps, for every rank, the last
    place of it for which it waits, directly or not: a vector clock.
    """
    graph = _Graph(programmes, queue)
    nothing = [-1] * len(programmes)
    clocks = [nothing] * len(graph.before)
    rank_of = [pp_rank for pp_rank, programme in enumerate(programmes) for _ in programme]
    for node in graph.order():
        before = [clocks[other] for other in graph.before[node]]
        clock = [max(values) for values in zip(*before, strict=True)] if len(before) > 1 else (before or [nothing])[0]
        if node % 3 == HOST:
            clock = list(clock)
            clock[rank_of[node // 3]] = node // 3
        clocks[node] = clock
    found = []
    for pp_rank, (first, last) in enumerate(graph.bounds):
        furthest, places = -1, []
        for index in range(first, last):
            if furthest >= index:
                places.append(index - first)
            furthest = max(furthest, clocks[3 * index + COMPLETE][pp_rank])
        found.append(places)
    return found


def with_waits(programme: Programme, places: Iterable[int]) -> Programme:
    """Return the programme with a device-wide wait before each of these places."""
    chosen = set(places)
    return [each for place, entry in enumerate(programme) for each in [HostWait()] * (place in chosen) + [entry]]


HOST, START, COMPLETE = range(3)  # the host comes to an entry; its device starts it; it is complete


class _Graph:
    """What waits for what. A node is 3 * (index of an entry among those of all ranks) + HOST, START or COMPLETE."""

    def __init__(self, programmes: Sequence[Programme], queue: Queue, launch_blocking: bool = False):
        self.queue, self.launch_blocking = queue, launch_blocking
        self.entries = [entry for programme in programmes for entry in programme]
        self.before: list[list[int]] = [[] for _ in range(3 * len(self.entries))]  # the nodes that a node waits for
        self.bounds: list[tuple[int, int]] = []  # of the entries of a rank
        # (communicator, sender, receiver), is_send -> entries in order
        self.ends: dict[Hashable, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
        for pp_rank, programme in enumerate(programmes):
            first = self.bounds[-1][1] if self.bounds else 0
            self.bounds.append((first, first + len(programme)))
            self._add_rank(pp_rank, first, programme)
        for ends in self.ends.values():
            self._match(ends)

    def _add_rank(self, pp_rank: int, first: int, programme: Programme) -> None:
        started: dict[Hashable, int] = {}  # hardware queue -> the start of its last command
        completed: dict[Hashable, int] = {}  # stream -> the end of its last command
        end_of: dict[Entry, int] = {}
        host: list[int] = []  # the node after which the host goes on
        for index, entry in enumerate(programme, first):
            node = 3 * index
            start = self.before[node + START]
            self.before[node + HOST] += host
            start.append(node + HOST)
            self.before[node + COMPLETE].append(node + START)
            end_of[entry] = node + COMPLETE
            host = [node + HOST]
            if isinstance(entry, HostWait):
                start += completed.values() if entry.message is None else [end_of[entry.message]]
                host = [node + COMPLETE]
                continue
            if entry.end is not None:
                ranks = (pp_rank, entry.end.peer) if entry.end.is_send else (entry.end.peer, pp_rank)
                self.ends[type(entry), entry.end.communicator, ranks][entry.end.is_send].append(index)
            if isinstance(entry, Command):
                queue = self.queue(pp_rank, entry.stream)
                start += [last[key] for last, key in ((started, queue), (completed, entry.stream)) if key in last]
                start += [end_of[other] for other in entry.after]
                started[queue], completed[entry.stream] = node + START, node + COMPLETE
                if self.launch_blocking:
                    host = [node + COMPLETE]

    def _match(self, ends: dict[bool, list[int]]) -> None:
        """Have the two ends of each message wait for each other, and one without another end for itself, for ever."""
        for sent, received in zip_longest(ends[True], ends[False]):
            for end, other in ((sent, received), (received, sent)):
                if end is not None:
                    waits_for = 3 * end + COMPLETE if other is None else 3 * other + START
                    self.before[3 * end + COMPLETE].append(waits_for)
            if sent is not None and received is not None:
                pair = self.entries[sent], self.entries[received]
                if pair[0].end.content != pair[1].end.content:
                    raise Mismatch(f"{pair[0].name} is matched with {pair[1].name}")

    def order(self) -> Iterator[int]:
        """Yield the nodes, each after those that it waits for; raise Hang where a circle is left."""
        after: list[list[int]] = [[] for _ in self.before]
        missing = [len(nodes) for nodes in self.before]
        for node, nodes in enumerate(self.before):
            for other in nodes:
                after[other].append(node)
        ready = [node for node, count in enumerate(missing) if not count]
        while ready:
            node = ready.pop()
            yield node
            for other in after[node]:
                missing[other] -= 1
                if not missing[other]:
                    ready.append(other)
        if any(missing):
            raise Hang("\n".join(["no rank can go on:", *self._blocked(missing)]))

    def _blocked(self, missing: list[int]) -> Iterator[str]:
        for pp_rank, bounds in enumerate(self.bounds):
            left = [index for index in range(*bounds) if missing[3 * index + COMPLETE]]
            if left:
                started = not missing[3 * left[0] + START]
                what = "waits for its other end" if started else "cannot start"
                stop = next((index for index in left if missing[3 * index + HOST]), None)
                where = "" if stop is None else f"; its host is in {self.entries[stop - 1].name}"
                yield f"  pp_rank {pp_rank}: {self.entries[left[0]].name} {what}{where}"

"""The time of a step: exact from its plan (`replay_step`), or from a formula (`formula_step`) for long plans.

Both take the durations of `time.durations`. The formula adds, for P ranks, V chunks, M micro-batches in groups of G,
forward f and backward b of a stage, and c = hop + transfer:
    the busiest rank, with what must run before its first and after its last action     max over ranks
    fill and drain of the network, summed over the edges on the way                     2 (P-1) c
    forwards of a chunk that wait for the chunk before, V-1 times; backwards alike      max(0, P (f + c) - G f)
    Megatron's loop, which waits for each send of an output to leave                    `_waits_for_sends`
    1F1B, where each P-th micro-batch waits for the way to the last rank and back       c (2 M (P-1) / P - 2)
    data parallelism: the first gather, the last reduction, and what exceeds a group of a chunk of the others
It holds for M a multiple of G, and agrees with the replay within 3% where c < f and M > 2 (tested). Beyond that it is
too low. Of stages that differ f and b are the median. With deferred weights' gradients the busiest rank waits for less
(`_idle`). Where stages before the last differ, the first two lines are the longest path through all stages
(flow.py): the longest stage of a chunk holds up the others.
"""

from dataclasses import dataclass
from math import inf
from statistics import median_low

from ...schedule.costs import Costs, Waits, at
from ...schedule.names import predict
from ...schedule.replay import replay
from ..strategy import Strategy
from ..time import Durations
from .flow import LEAD, computing_time

__all__ = ["REPLAY_LIMIT", "Step", "formula_step", "replay_step"]

# Stages times micro-batches of the longest plan that is replayed, which takes about a second.
REPLAY_LIMIT = 8192


@dataclass(frozen=True)
class Step:
    """The times of a step of the whole job, in seconds."""

    step: float
    busy: float  # mean time that a rank computes, tensor parallelism included
    without_network: float  # the step, were messages and data parallelism free
    is_exact: bool

    @property
    def bubble_fraction(self) -> float:
        """The idle part of the step without network, as `bfpp show` prints it."""
        return 1 - self.busy / self.without_network

    @property
    def exposed_communication(self) -> float:
        """Seconds that messages, gathers and reductions add to the step; tensor parallelism is in `busy`."""
        return self.step - self.without_network


def replay_step(strategy: Strategy, times: Durations, connections: int | None = None) -> Step:
    """Replay the plan of the step. One rank has no plan: the formula is exact for it.

    connections: hardware queues of a GPU; None for one of each stream.
    """
    if strategy.pp == 1:
        return formula_step(strategy, times)
    s, shape = strategy, strategy.shape
    plan, predicted = predict(s.schedule, s.order(), shape, times, s.resident_chunks, s.hop, connections)
    step = predicted.step_time + times.ends + times.optimizer
    free = replay(plan, shape, Costs(times.forward, times.backward, times.weights), Waits(for_sends=False)).step_time
    return _step(strategy, times, step, free, True)


def _step(strategy: Strategy, times: Durations, step: float, free: float, is_exact: bool) -> Step:
    busy = strategy.num_microbatches * (sum(times.forward) + sum(times.backward)) / strategy.pp
    return Step(step, busy + times.optimizer, free + times.optimizer, is_exact)


def formula_step(strategy: Strategy, times: Durations) -> Step:
    """Estimate the step without its plan."""
    free = _computing(strategy, times, [0.0] * strategy.pp, lead=inf)
    step = _computing(strategy, times, times.messages(strategy.pp)) + _waits_for_sends(strategy, times)
    return _step(strategy, times, step + _data_parallel(strategy, times) + times.optimizer, free, strategy.pp == 1)


def _computing(strategy: Strategy, times: Durations, messages: list[float], lead: float = LEAD) -> float:
    if strategy.pp > 1 and (len(set(strategy.stage_layers)) > 1 or len(set(times.forward[:-1])) > 1):
        return _uneven(strategy, times, messages, lead)
    pp, chunks, count = strategy.pp, strategy.chunks, strategy.num_microbatches
    both = [forward + backward for forward, backward in zip(times.forward, times.backward, strict=True)]
    before = after = 0.0
    last = both[(chunks - 1) * pp :]
    busiest = 0.0
    after = sum(last)
    for rank in range(pp):
        after -= last[rank]
        busiest = max(busiest, count * sum(both[rank::pp]) + before + after)
        before += both[rank]
    if pp == 1:
        return busiest
    if strategy.is_split:
        return max(count * sum(both[rank::pp]) for rank in range(pp)) + _idle(strategy, times, messages)
    total = busiest + 2 * sum(messages[:-1]) + _loops(strategy, times, messages)
    return total + _round_trips(strategy, times, messages)


def _uneven(strategy: Strategy, times: Durations, messages: list[float], lead: float) -> float:
    """Return the time of stages of which some are longer: the longest path, and what it does not follow."""
    pp, loops = strategy.pp, _loops(strategy, times, messages)
    total = computing_time(strategy, times.forward, times.backward, messages, lead)
    total += loops if strategy.group < strategy.num_microbatches else 0.0
    if not strategy.is_split:
        return total + _round_trips(strategy, times, messages)
    # Deferring saves what it would save on stages that are alike; each rank has to compute all that is its own.
    both = [forward + backward for forward, backward in zip(times.forward, times.backward, strict=True)]
    fill = (pp - 1) * (median_low(times.forward) + median_low(times.backward)) + 2 * sum(messages[:-1]) + loops
    busiest = max(strategy.num_microbatches * sum(both[rank::pp]) for rank in range(pp))
    return max(busiest, total + _idle(strategy, times, messages) - fill)


def _loops(strategy: Strategy, times: Durations, messages: list[float]) -> float:
    """Return how long chunks wait for the one before, whose first micro-batch has to go around all ranks."""
    pp, group, ring = strategy.pp, strategy.group, sum(messages)
    firsts = (median_low(times.forward), median_low(times.backward))
    return (strategy.chunks - 1) * sum(max(0.0, pp * each + ring - group * each) for each in firsts)


def _round_trips(strategy: Strategy, times: Durations, messages: list[float]) -> float:
    """Return what 1F1B adds, of which pp micro-batches are on their way at one time."""
    if strategy.schedule != "1f1b":
        return 0.0
    pp, way = strategy.pp, sum(messages[:-1])
    both = [forward + backward for forward, backward in zip(times.forward, times.backward, strict=True)]
    round_trip = (sum(both) + 2 * way) / pp
    return max(0.0, strategy.num_microbatches * (round_trip - max(both)) - 2 * way / (pp - 1))


def _idle(strategy: Strategy, times: Durations, messages: list[float]) -> float:
    """Return how long a rank waits in a step with deferred weights' gradients, on stages like the first.

    Of (P-1) (f + i) until the last rank starts and until the first has the last gradient, W's fill what is owed, at
    most M-1 of a chunk; the way to the last rank stays, and what comes late where M < P. Tested against the replay.
    """
    others, count, way = strategy.pp - 1, strategy.num_microbatches, sum(messages[:-1])
    f, w = median_low(times.forward), at(times.weights or 0.0, 0)
    i = median_low(times.backward) - w
    there, back = others * f + way, others * i + way
    owed = min(count - 1, max(strategy.most_lags))
    idle = max(there, back - (count - strategy.pp) * f, there + back - owed * w)
    ring, group = sum(messages), strategy.group
    loops = max(0.0, strategy.pp * f + ring - group * f) + max(0.0, strategy.pp * i + ring - group * (i + w))
    return idle + (strategy.chunks - 1) * loops


def _waits_for_sends(strategy: Strategy, times: Durations) -> float:
    if not strategy.is_interleaved:
        return 0.0
    pp, count, group = strategy.pp, strategy.num_microbatches, strategy.group
    t = max(at(times.transfer, edge) for edge in range(pp))
    f, b = median_low(times.forward), median_low(times.backward)
    loop = pp * f + sum(times.messages(pp))
    per_chunk = (count - group) * t + max(group * (f + t), loop) - max(group * f, loop)
    if count == group == pp:
        return (strategy.chunks - 1) * per_chunk
    # On the last chunk a rank waits within each forward and backward, less what the longest stage takes longer.
    slack = max(times.forward) + max(times.backward) - f - b
    return (strategy.chunks - 1) * per_chunk + max(0.0, (count - 1) * (t - slack) - b)


def _data_parallel(strategy: Strategy, times: Durations) -> float:
    more, ring = strategy.chunks - 1, sum(times.messages(strategy.pp))
    # A chunk lasts as long as its group, or as the way of its first micro-batch around the ranks.
    firsts = (median_low(times.forward), median_low(times.backward))
    forward, backward = (max(strategy.group * each, strategy.pp * each + ring) for each in firsts)
    # The first gather overlaps its own forward, except for one bucket.
    first = max(times.gather / times.buckets, times.gather - times.forward[0] * (1 - 1 / times.buckets))
    gathers = first + more * max(0.0, times.gather - forward)
    again = max(0, strategy.chunks - strategy.resident_chunks) if strategy.resident_chunks else 0
    # A chunk that is gathered again waits for its gather, which waits for the reduction before it.
    gathers += again * max(0.0, times.reduction + times.gather - backward)
    return gathers + _reductions(strategy, times, backward, 1 if again else more) + times.ends


def _reductions(strategy: Strategy, times: Durations, backward: float, most: int) -> float:
    """Return the time of reductions after the last backward. backward: time of a chunk's backwards.

    Reductions queue, so the step ends with the last of them that follow without a gap. They begin with the last bucket
    of the last chunk, or with all its buckets, or n chunks and so n `backward` earlier; n is 1 or `most`, as each chunk
    adds the same. Earlier chunks have buckets only if they are sharded; the first is ready before the backward ends.
    """
    reduction, early = times.reduction, times.backward[0] * (1 - 1 / times.buckets)
    ends = [reduction / times.buckets, reduction - early]
    if strategy.resident_chunks is None:
        early = 0.0
    ends += [(n + 1) * reduction - n * backward - early for n in {min(1, most), most} - {0}]
    return max(ends)

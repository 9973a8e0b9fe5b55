"""The time of a step: exact from its plan (`replay_step`), or from a formula (`formula_step`) where a plan is too long.

Both take the durations of `time.durations`. The formula, for P ranks, V chunks, M micro-batches in groups of G, the forward f
and backward b of a stage, c = hop + transfer:
    busiest rank, with what must run before its first and after its last action          max over ranks
    fill and drain of the network                                                        2 (P-1) c
    forwards and backwards of a chunk that wait for the chunk before, each V-1 times     max(0, P (f + c) - G f), same with b
    Megatron's loop, which waits for each send of an output to leave                     `_waits_for_sends`
    1F1B, where each P-th micro-batch waits for the way to the last rank and back         c (2 M (P-1) / P - 2)
    data parallelism: the first gather and last reduction, and what of the others does not fit under a group of a chunk
It holds for M a multiple of G, and agrees with the replay within 3% where c < f and M > 2 (tested). Beyond that it underestimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule import lower
from ..schedule.collectives import OURS, Costs
from ..schedule.replay import replay
from ..schedule.upstream import MEGATRON, aligned
from .strategy import BREADTH_FIRST, Strategy
from .time import Durations

__all__ = ["REPLAY_LIMIT", "Step", "formula_step", "replay_step"]

# Stages times micro-batches up to which a plan is replayed: about a second.
REPLAY_LIMIT = 8192


@dataclass(frozen=True)
class Step:
    """Of the whole job, in seconds."""

    step: float
    busy: float  # mean time that a rank computes, tensor parallelism included
    without_network: float  # the step, were messages and data parallelism free
    is_exact: bool

    @property
    def bubble_fraction(self) -> float:
        """Of the step without network, as `bfpp show` gives it."""
        return 1 - self.busy / self.without_network

    @property
    def exposed_communication(self) -> float:
        """Seconds that messages, gathers and reductions add to the step; tensor parallelism is in `busy`."""
        return self.step - self.without_network


def replay_step(strategy: Strategy, times: Durations) -> Step:
    """Replays the plan of the step. One rank has no plan: there the formula is exact."""
    if strategy.pp == 1:
        return formula_step(strategy, times)
    shape, is_chunked = strategy.shape, strategy.schedule.startswith("interleaved")
    plan = lower(strategy.order(), shape, resident_chunks=strategy.resident_chunks)
    if is_chunked:
        plan = aligned(plan, shape)
    costs = Costs(
        times.forward,
        times.backward,
        times.hop,
        times.transfer,
        times.gather,
        times.reduction,
        1 if is_chunked else times.buckets,
    )
    waits = OURS if strategy.schedule in BREADTH_FIRST else MEGATRON
    step = replay(plan, shape, costs, waits).step_time + times.ends + times.optimizer
    free = replay(plan, shape, Costs(times.forward, times.backward)).step_time
    return _step(strategy, times, step, free, True)


def _step(strategy: Strategy, times: Durations, step: float, free: float, is_exact: bool) -> Step:
    busy = strategy.num_microbatches * (sum(times.forward) + sum(times.backward)) / strategy.pp
    return Step(step, busy + times.optimizer, free + times.optimizer, is_exact)


def formula_step(strategy: Strategy, times: Durations) -> Step:
    free = _computing(strategy, times, 0.0)
    step = _computing(strategy, times, times.hop + times.transfer) + _waits_for_sends(strategy, times)
    return _step(strategy, times, step + _data_parallel(strategy, times) + times.optimizer, free, strategy.pp == 1)


def _computing(strategy: Strategy, times: Durations, c: float) -> float:
    pp, chunks, count, group = strategy.pp, strategy.chunks, strategy.num_microbatches, strategy.group
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
    f, b = times.forward[0], times.backward[0]
    loops = (chunks - 1) * (max(0.0, pp * (f + c) - group * f) + max(0.0, pp * (b + c) - group * b))
    total = busiest + 2 * (pp - 1) * c + loops
    if strategy.schedule == "1f1b":  # pp micro-batches are on their way at one time
        round_trip = (sum(both) + 2 * (pp - 1) * c) / pp
        total += max(0.0, count * (round_trip - max(both)) - 2 * c)
    return total


def _waits_for_sends(strategy: Strategy, times: Durations) -> float:
    if not strategy.schedule.startswith("interleaved"):
        return 0.0
    pp, count, group, t = strategy.pp, strategy.num_microbatches, strategy.group, times.transfer
    f, b = times.forward[0], times.backward[0]
    loop = pp * (f + t + times.hop)
    per_chunk = (count - group) * t + max(group * (f + t), loop) - max(group * f, loop)
    if count == group == pp:
        return (strategy.chunks - 1) * per_chunk
    # On the last chunk a rank waits within each forward and backward, but for the time that the longest stage takes longer.
    slack = max(times.forward) + max(times.backward) - f - b
    return (strategy.chunks - 1) * per_chunk + max(0.0, (count - 1) * (t - slack) - b)


def _data_parallel(strategy: Strategy, times: Durations) -> float:
    more, c = strategy.chunks - 1, times.hop + times.transfer
    # A chunk lasts as long as its group, or as the way of its first micro-batch around the ranks.
    forward, backward = (
        max(strategy.group * each[0], strategy.pp * (each[0] + c)) for each in (times.forward, times.backward)
    )
    # The first gather and the last reduction overlap their own forward and backward, but for a bucket.
    buckets = times.buckets
    first = max(times.gather / buckets, times.gather - times.forward[0] * (1 - 1 / buckets))
    last = max(times.reduction / buckets, times.reduction - times.backward[0] * (1 - 1 / buckets))
    again = max(0, strategy.chunks - strategy.resident_chunks) if strategy.resident_chunks else 0
    gathers = first + more * max(0.0, times.gather - forward)
    under = more * (times.reduction - backward) + again * times.gather
    return gathers + last + max(0.0, under) + times.ends

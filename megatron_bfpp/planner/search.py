"""What every way to divide a model over GPUs would need and take, and which are the fastest."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from .memory import PRECISIONS, Memory, memory
from .model import GPT
from .steps import REPLAY_LIMIT, Step, formula_step, replay_step
from .strategy import SCHEDULES, Strategy
from .time import durations
from .ways import Request, recomputations, ways

__all__ = ["TOO_LARGE", "Estimate", "Found", "Request", "estimate", "search"]

# How many strategies of each schedule, the fastest by the formula first, are replayed exactly: at least, and at most
# until the fastest is among them.
REPLAYED, MOST_REPLAYED = 3, 12
LONGEST = 50_000  # stages times micro-batches of all replays of one search, which take about 5 s
TOO_LARGE = "memory: more than a GPU has"
SEARCHING = 0.4  # part of the time of a search that passes before the replays

Progress = Callable[[float], None]  # takes the part of a search that is done, 0 to 1


@dataclass(frozen=True)
class Estimate:
    """A strategy that fits, with its predicted time and memory."""

    strategy: Strategy
    step: Step
    memory: Memory  # of the rank that needs most
    tensor_parallel: float  # seconds of the step, in step.busy
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float  # as Megatron reports them
    connections: int  # hardware queues of a GPU


@dataclass(frozen=True)
class Found:
    """The strategies that fit, fastest first, and the reasons why others do not, with how many each rejected."""

    estimates: list[Estimate]
    rejected: Counter[str]
    considered: int
    smallest: Memory | None  # of the strategies that are too large, the least memory


def estimate(request: Request, strategy: Strategy, exact: bool) -> Estimate:
    """Predict time and memory of one strategy. exact: replay its plan where that is short enough."""
    gpt, gpu = request.gpt, request.gpu
    times = durations(gpt, strategy, gpu, request.precision, request.overlap)
    connections = request.connections or strategy.connections(gpu.compute_capability)
    is_short = strategy.pp * strategy.chunks * strategy.num_microbatches <= REPLAY_LIMIT
    step = replay_step(strategy, times, connections) if exact and is_short else formula_step(strategy, times)
    tokens = strategy.global_batch * gpt.seq_length / step.step / strategy.num_gpus
    return Estimate(
        strategy,
        step,
        _largest(request, strategy),
        times.tensor_parallel * strategy.chunks * strategy.num_microbatches,
        tokens,
        gpt.flops(strategy.global_batch) / step.step / strategy.num_gpus / 1e12,
        connections,
    )


def _largest(request: Request, strategy: Strategy, enough: float = inf) -> Memory:
    """Return the memory of the rank that needs most, or of one that needs more than `enough`.

    The first has the most live activations and the embedding, the last has the logits; all between have less, and of
    those with the same layers the first has most. Where weights' gradients wait, the first that owes as much as the
    last holds more live activations beside them.
    """
    fixed = (request.gpt, strategy, PRECISIONS[request.precision], request.gpu.flash_attention)
    begin = strategy.most_lags.index(strategy.most_lags[-1]) if strategy.is_split else 0
    ranks = {*_unlike(request.gpt, strategy, 0), *_unlike(request.gpt, strategy, begin)}
    found: Memory | None = None
    for rank in sorted(ranks):
        of_rank = memory(*fixed, rank)
        if found is None or of_rank.total > found.total:
            found = of_rank
        if found.total > enough:
            break
    assert found is not None, "a pipeline has a rank"
    return found


def _unlike(gpt: GPT, s: Strategy, begin: int) -> list[int]:
    """Return the first rank of each kind of layers, from rank `begin` on."""

    def found() -> list[int]:
        _, kinds = gpt.alike(s.stages(gpt))
        of_ranks = [tuple(kinds[rank :: s.pp]) for rank in range(begin, s.pp)]
        return sorted(begin + of_ranks.index(each) for each in set(of_ranks))

    return gpt.once(("unlike", s.stage_layers, s.mtp_stage, s.pp, s.chunks, begin), found)


def _fitted(request: Request, strategy: Strategy, enough: float) -> tuple[Strategy, Memory]:
    """Return the strategy with its memory; one that is too large, with the largest dial with which it fits, if any."""
    needed, usable = _largest(request, strategy, enough), request.gpu.memory - request.reserve
    if needed.total <= usable or not strategy.is_split:
        return strategy, needed
    fits, over = replace(strategy, weight_lag=0), strategy.most_lags[-1]
    if (least := _largest(request, fits, enough)).total > usable:
        return fits, least
    while over - (fits.weight_lag or 0) > 1:
        middle = replace(strategy, weight_lag=((fits.weight_lag or 0) + over) // 2)
        if (each := _largest(request, middle, usable)).total <= usable:
            fits, least = middle, each
        else:
            over = middle.weight_lag or 0
    return fits, least


def search(request: Request, progress: Progress = lambda part: None) -> Found:
    """Estimate every strategy, and replay the fastest of each schedule."""
    rejected: Counter[str] = Counter()
    estimates: list[Estimate] = []
    smallest: Memory | None = None
    for part, way in ways(request):
        progress(SEARCHING * part)
        if isinstance(way, str):
            rejected[way] += 1
            continue
        options: list[Strategy] = []
        for found in recomputations(request, way):
            if isinstance(found, str):
                rejected[found] += 1
            else:
                options.append(found)
        fits, too_large = _first_that_fits(request, options, smallest)
        if too_large:
            rejected[TOO_LARGE] += len(too_large)
            smallest = min((smallest, *too_large) if smallest else too_large, key=lambda needed: needed.total)
        if fits is not None:
            estimates.append(estimate(request, fits, exact=False))
    considered = len(estimates) + rejected.total()
    return Found(_exactly(request, estimates, progress), rejected, considered, smallest)


def _first_that_fits(
    request: Request, options: list[Strategy], smallest: Memory | None
) -> tuple[Strategy | None, list[Memory]]:
    """Return the first of strategies that need less and less memory which fits, and the needs of those that do not.

    smallest: the least need of those so far. Of what needs more it is enough to know that it does.
    """
    too_large: list[Memory] = []
    usable = request.gpu.memory - request.reserve
    enough = inf if smallest is None else max(usable, smallest.total)
    for option in options[-1:]:
        _, least = _fitted(request, option, enough)
        if least.total > usable:
            return None, [least] * len(options)
    for option in options:
        fitted, needed = _fitted(request, option, enough)
        if needed.total <= usable:
            return fitted, too_large
        too_large.append(needed)
    return None, too_large


def _exactly(request: Request, estimates: list[Estimate], progress: Progress) -> list[Estimate]:
    """Sort by time, with the fastest of each schedule replayed: the formula leaves out shared cards, and so is too fast
    at times.
    """
    found: list[Estimate] = []
    for place, schedule in enumerate(SCHEDULES):
        rest = sorted((each for each in estimates if each.strategy.schedule == schedule), key=_rank, reverse=True)
        exact: list[Estimate] = []
        left = LONGEST / len(SCHEDULES)
        while rest and len(exact) < MOST_REPLAYED and (not exact or _length(rest[-1].strategy) <= left):
            if len(exact) >= REPLAYED and min(map(_rank, exact)) <= _rank(rest[-1]):
                break
            progress(SEARCHING + (1 - SEARCHING) * (place + len(exact) / MOST_REPLAYED) / len(SCHEDULES))
            left -= _length(rest[-1].strategy)
            exact.append(estimate(request, rest.pop().strategy, exact=True))
        found += exact + rest
    return sorted(found, key=_rank)


def _length(strategy: Strategy) -> int:
    return strategy.pp * strategy.chunks * strategy.num_microbatches


def _rank(each: Estimate) -> tuple[float, float]:
    return round(each.step.step, 6), each.memory.total

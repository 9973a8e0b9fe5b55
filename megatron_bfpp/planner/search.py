"""Every way to divide a model over GPUs: what each would need and take, and why some are not possible."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..schedule.lower import DEFAULT_HOP
from .hardware import GPU
from .memory import PRECISIONS, Memory, memory
from .model import GPT
from .steps import REPLAY_LIMIT, Step, formula_step, replay_step
from .strategy import BREADTH_FIRST, DEFERRED, RECOMPUTES, SCHEDULES, SHARDINGS, Strategy, count_microbatches
from .time import durations

__all__ = ["Estimate", "Found", "Request", "estimate", "search"]

# How many strategies of each schedule, the fastest by the formula first, are replayed exactly: at least, and at most
# until the fastest is among them.
REPLAYED, MOST_REPLAYED = 4, 12
SEARCHING = 0.4  # part of the time of a search that passes before the replays

Progress = Callable[[float], None]  # takes the part of a search that is done, 0 to 1


@dataclass(frozen=True)
class Request:
    """A question to the search. An empty tuple leaves that choice to it."""

    gpt: GPT
    gpu: GPU
    num_gpus: int
    global_batch: int
    precision: str
    reserve: float = 4e9  # bytes of a GPU for CUDA, NCCL and fragments of memory
    hypothetical: bool = False  # also what Megatron refuses today
    sequence_parallel: bool = True
    overlap: bool = True  # of Megatron's schedules
    connections: int | None = None  # hardware queues of a GPU; None for what Megatron demands
    hop: float = DEFAULT_HOP  # of --breadth-first-hop
    schedule: tuple[str, ...] = ()
    pp: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    sharding: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()


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


def _largest(request: Request, strategy: Strategy) -> Memory:
    """Return the memory of the rank that needs most.

    The first has the most live activations and the embedding, the last has the logits; all between have less. Where
    weights' gradients wait, the first rank that owes as much as the last holds more live activations beside them.
    """
    fixed = (request.gpt, strategy, PRECISIONS[request.precision], request.gpu.flash_attention)
    ranks = {0, strategy.pp - 1}
    if strategy.is_split:
        ranks.add(strategy.most_lags.index(strategy.most_lags[-1]))
    return max((memory(*fixed, rank) for rank in ranks), key=lambda of_rank: of_rank.total)


def _fitted(request: Request, strategy: Strategy) -> tuple[Strategy, Memory]:
    """Return the strategy with its memory; one that is too large, with the largest dial with which it fits, if any."""
    needed, usable = _largest(request, strategy), request.gpu.memory - request.reserve
    if needed.total <= usable or not strategy.is_split:
        return strategy, needed
    fits, over = replace(strategy, weight_lag=0), strategy.most_lags[-1]
    if (least := _largest(request, fits)).total > usable:
        return fits, least
    while over - (fits.weight_lag or 0) > 1:
        middle = replace(strategy, weight_lag=((fits.weight_lag or 0) + over) // 2)
        if (each := _largest(request, middle)).total <= usable:
            fits, least = middle, each
        else:
            over = middle.weight_lag or 0
    return fits, least


def search(request: Request, progress: Progress = lambda part: None) -> Found:
    """Estimate every strategy, and replay the fastest of each schedule."""
    rejected: Counter[str] = Counter()
    estimates: list[Estimate] = []
    too_large: list[Memory] = []
    divisions = list(_divisions(request))
    for done, (pp, tp) in enumerate(divisions):
        progress(SEARCHING * done / len(divisions))
        for found in _strategies(request, pp, tp):
            if isinstance(found, str):
                rejected[found] += 1
                continue
            fitted, needed = _fitted(request, found)
            if needed.total > request.gpu.memory - request.reserve:
                too_large.append(needed)
            else:
                estimates.append(estimate(request, fitted, exact=False))
    if too_large:
        rejected["memory: more than a GPU has"] = len(too_large)
    smallest = min(too_large, key=lambda needed: needed.total, default=None)
    considered = len(estimates) + rejected.total()
    return Found(_exactly(request, estimates, progress), rejected, considered, smallest)


def _exactly(request: Request, estimates: list[Estimate], progress: Progress) -> list[Estimate]:
    """Sort by time, with the fastest of each schedule replayed: the formula leaves out shared cards, and so is too fast
    at times.
    """
    found: list[Estimate] = []
    for place, schedule in enumerate(SCHEDULES):
        rest = sorted((each for each in estimates if each.strategy.schedule == schedule), key=_rank, reverse=True)
        exact: list[Estimate] = []
        while rest and len(exact) < MOST_REPLAYED:
            if len(exact) >= REPLAYED and min(map(_rank, exact)) <= _rank(rest[-1]):
                break
            progress(SEARCHING + (1 - SEARCHING) * (place + len(exact) / MOST_REPLAYED) / len(SCHEDULES))
            exact.append(estimate(request, rest.pop().strategy, exact=True))
        found += exact + rest
    return sorted(found, key=_rank)


def _rank(each: Estimate) -> tuple[float, float]:
    return round(each.step.step, 6), each.memory.total


def _divisions(request: Request) -> Iterator[tuple[int, int]]:
    for tp in request.tp or _divisors(request.num_gpus, request.gpu.gpus_per_node):
        for pp in request.pp or _divisors(max(1, request.num_gpus // tp), request.gpt.num_layers):
            yield pp, tp


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _indivisible(request: Request, pp: int, tp: int) -> str | None:
    gpt = request.gpt
    if tp > request.gpu.gpus_per_node:
        return "TP: more ranks than GPUs in a node"
    if gpt.num_attention_heads % tp or gpt.groups % tp or gpt.ffn % tp:
        return "TP: heads, query groups or the MLP's width do not divide"
    if request.num_gpus % (pp * tp):
        return "GPUs are no multiple of PP x TP"
    if gpt.num_layers % pp:
        return "layers are no multiple of PP"
    if request.global_batch % (request.num_gpus // (pp * tp)):
        return "global batch is no multiple of DP"
    return None


def _strategies(request: Request, pp: int, tp: int) -> Iterator[Strategy | str]:
    """Yield the strategies of these sizes, or the reasons why there are none."""
    reason = _indivisible(request, pp, tp)
    if reason is not None:
        yield reason
        return
    dp = request.num_gpus // (pp * tp)
    for micro_batch in request.micro_batch or (1, 2, 4, 8, 16):
        count = count_microbatches(request.global_batch, dp, micro_batch)
        if count is None:
            if request.micro_batch or dp * micro_batch <= request.global_batch:
                yield "batch of a replica is no multiple of the micro-batch"
            continue
        for schedule in request.schedule or SCHEDULES:
            if (schedule == "no-pipeline") != (pp == 1):
                continue
            for chunks, group in _chunks_and_groups(request, schedule, pp, count):
                sizes = (pp, tp, dp, chunks, micro_batch, count, group)
                base = Strategy(schedule, *sizes, sequence_parallel=request.sequence_parallel, hop=request.hop)
                reason = _refused(request, base)
                yield from _sharded(request, base) if reason is None else (reason,)


def _chunks_and_groups(request: Request, schedule: str, pp: int, count: int) -> Iterator[tuple[int, int]]:
    if schedule in ("no-pipeline", "1f1b"):
        if not request.chunks or 1 in request.chunks:
            yield 1, count
        return
    for chunks in request.chunks or _divisors(max(1, request.gpt.num_layers // pp), request.gpt.num_layers):
        if chunks == 1:
            continue
        groups = request.group
        if not groups:
            fewer = [group for group in (pp, 2 * pp, 4 * pp) if group < count and count % group == 0]
            groups = {"interleaved": (pp,), "interleaved-grouped": (count,)}.get(schedule, (*fewer, count))
        yield from ((chunks, group) for group in groups)


def _refused(request: Request, s: Strategy) -> str | None:
    if request.gpt.num_layers % (s.pp * s.chunks):
        return "layers are no multiple of PP x chunks"
    if s.is_interleaved:
        rest = s.num_microbatches % s.group
        if s.num_microbatches < s.pp or not s.pp <= s.group <= s.num_microbatches or 0 < rest < s.pp:
            return "Megatron's interleaved schedule refuses so few micro-batches"
        if s.schedule == "interleaved-grouped" and s.group == s.pp and not request.group:
            return "the same as interleaved: one group"
    if s.schedule in BREADTH_FIRST and (s.group > s.num_microbatches or s.num_microbatches % s.group):
        return "micro-batches are no multiple of the group"
    return None


def _sharded(request: Request, base: Strategy) -> Iterator[Strategy | str]:
    """Yield a strategy with each sharding and recomputation, or the reason why it is not possible."""
    for sharding, recompute in product(request.sharding or SHARDINGS, request.recompute or RECOMPUTES):
        reason = _sharding_refused(request, base, sharding)
        if recompute == "selective" and request.gpu.flash_attention:
            reason = "selective recomputation: saves nothing with flash attention"
        times = request.gpt.times(recompute) if base.schedule == DEFERRED else base.times
        yield reason or replace(base, sharding=sharding, recompute=recompute, times=times)


def _sharding_refused(request: Request, base: Strategy, sharding: str) -> str | None:
    if sharding != "replicated" and base.dp == 1:
        return "sharding: one data-parallel rank"
    if sharding == "replicated" and request.precision == "fp8-params" and base.dp > 1:
        return "fp8 parameters: only with the distributed optimizer"
    if sharding in ("replicated", "zero1"):
        return None
    if base.schedule not in BREADTH_FIRST:
        return f"{sharding}: only with the breadth-first schedule"
    if base.group < base.num_microbatches:  # a chunk would be gathered and reduced for each group
        return f"{sharding}: only with one group of all micro-batches"
    if request.precision.startswith("fp8"):
        return f"{sharding}: not in the model with fp8"
    if not request.hypothetical and request.precision == "fp16":
        return f"{sharding}: Megatron's FSDP2 has no fp16"
    if not request.hypothetical and not request.gpt.untied:
        return f"{sharding}: Megatron's FSDP2 needs untied embeddings"
    return None

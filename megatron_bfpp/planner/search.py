"""Every way to divide a model over GPUs, what each would need and take, and why the others cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from .hardware import GPU
from .memory import PRECISIONS, Memory, memory
from .model import GPT
from .steps import REPLAY_LIMIT, Step, formula_step, replay_step
from .strategy import BREADTH_FIRST, RECOMPUTES, SCHEDULES, SHARDINGS, Strategy
from .time import durations

__all__ = ["Estimate", "Found", "Request", "estimate", "search"]

# Of each schedule, how many of the fastest by the formula are replayed exactly: at least, and until the fastest is one of them, at most.
REPLAYED, MOST_REPLAYED = 4, 12


@dataclass(frozen=True)
class Request:
    """What is asked for. An empty tuple leaves the choice to the search."""

    gpt: GPT
    gpu: GPU
    num_gpus: int
    global_batch: int
    precision: str
    reserve: float = 4e9  # bytes of a GPU for CUDA, NCCL and fragments of memory
    hypothetical: bool = False  # also what Megatron refuses today
    sequence_parallel: bool = True
    overlap: bool = True  # of Megatron's schedules
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
    """A strategy that fits, with what it is predicted to need and to take."""

    strategy: Strategy
    step: Step
    memory: Memory  # of the rank that needs most
    tensor_parallel: float  # seconds of the step, in step.busy
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float  # as Megatron reports them


@dataclass(frozen=True)
class Found:
    """The strategies that fit, fastest first, and the reasons of those that do not, with how many each rejected."""

    estimates: list[Estimate]
    rejected: Counter[str]
    considered: int
    smallest: Memory | None  # the least memory that any strategy needs which is too large


def estimate(request: Request, strategy: Strategy, exact: bool) -> Estimate:
    gpt, gpu = request.gpt, request.gpu
    times = durations(gpt, strategy, gpu, request.precision, request.overlap)
    is_short = strategy.pp * strategy.chunks * strategy.num_microbatches <= REPLAY_LIMIT
    step = (replay_step if exact and is_short else formula_step)(strategy, times)
    tokens = strategy.global_batch * gpt.seq_length / step.step / strategy.num_gpus
    return Estimate(
        strategy,
        step,
        _largest(request, strategy),
        times.tensor_parallel * strategy.chunks * strategy.num_microbatches,
        tokens,
        gpt.flops(strategy.global_batch) / step.step / strategy.num_gpus / 1e12,
    )


def _largest(request: Request, strategy: Strategy) -> Memory:
    # The first rank has the most live activations and the embedding, the last the logits; those between have less than the first.
    ranks = {0, strategy.pp - 1}
    each = [
        memory(request.gpt, strategy, PRECISIONS[request.precision], request.gpu.flash_attention, rank)
        for rank in ranks
    ]
    return max(each, key=lambda of_rank: of_rank.total)


def search(request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> Found:
    """progress: called with how many of how many divisions over the GPUs are done."""
    rejected: Counter[str] = Counter()
    estimates: list[Estimate] = []
    smallest: Memory | None = None
    considered = 0
    divisions = list(_divisions(request))
    for done, (pp, tp) in enumerate(divisions):
        progress(done, len(divisions))
        reason = _indivisible(request, pp, tp)
        if reason is not None:
            rejected[reason] += 1
            considered += 1
            continue
        for found in _strategies(request, pp, tp):
            considered += 1
            if isinstance(found, str):
                rejected[found] += 1
                continue
            needed = _largest(request, found)
            if needed.total > request.gpu.memory - request.reserve:
                rejected["memory: more than a GPU has"] += 1
                smallest = needed if smallest is None or needed.total < smallest.total else smallest
            else:
                estimates.append(estimate(request, found, exact=False))
    return Found(_exactly(request, estimates), rejected, considered, smallest)


def _exactly(request: Request, estimates: list[Estimate]) -> list[Estimate]:
    """Fastest first, those at the top of each schedule replayed. The formula knows nothing of shared cards, and so is too fast at times."""
    found: list[Estimate] = []
    for schedule in SCHEDULES:
        rest = sorted((each for each in estimates if each.strategy.schedule == schedule), key=_rank, reverse=True)
        exact: list[Estimate] = []
        while rest and len(exact) < MOST_REPLAYED:
            if len(exact) >= REPLAYED and min(map(_rank, exact)) <= _rank(rest[-1]):
                break
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
    """Strategies of these sizes, or the reason why there is none."""
    dp = request.num_gpus // (pp * tp)
    of_replica = request.global_batch // dp
    for micro_batch in request.micro_batch or (1, 2, 4, 8, 16):
        if of_replica % micro_batch:
            if request.micro_batch or micro_batch <= of_replica:
                yield "batch of a replica is no multiple of the micro-batch"
            continue
        count = of_replica // micro_batch
        for schedule in request.schedule or SCHEDULES:
            if (schedule == "no-pipeline") != (pp == 1):
                continue
            for chunks, group in _chunks_and_groups(request, schedule, pp, count):
                base = Strategy(
                    schedule, pp, tp, dp, chunks, micro_batch, count, group, "zero1", "none", request.sequence_parallel
                )
                reason = _refused(request, base)
                if reason is not None:
                    yield reason
                    continue
                yield from _sharded(request, base)


def _chunks_and_groups(request: Request, schedule: str, pp: int, count: int) -> Iterator[tuple[int, int]]:
    if schedule in ("no-pipeline", "1f1b"):
        if not request.chunks or 1 in request.chunks:
            yield 1, count
        return
    for chunks in request.chunks or _divisors(max(1, request.gpt.num_layers // pp), request.gpt.num_layers):
        if chunks == 1:
            continue
        if request.group:
            yield from ((chunks, group) for group in request.group)
        elif schedule == "interleaved":
            yield chunks, pp
        elif schedule == "interleaved-grouped":
            yield chunks, count
        else:
            groups = [group for group in (pp, 2 * pp, 4 * pp) if group < count and count % group == 0]
            yield from ((chunks, group) for group in (*groups, count))


def _refused(request: Request, s: Strategy) -> str | None:
    if request.gpt.num_layers % (s.pp * s.chunks):
        return "layers are no multiple of PP x chunks"
    if s.schedule.startswith("interleaved"):
        rest = s.num_microbatches % s.group
        if s.num_microbatches < s.pp or not s.pp <= s.group <= s.num_microbatches or 0 < rest < s.pp:
            return "Megatron's interleaved schedule refuses so few micro-batches"
        if s.schedule == "interleaved-grouped" and s.group == s.pp and not request.group:
            return "the same as interleaved: one group"
    if s.schedule in BREADTH_FIRST and (s.group > s.num_microbatches or s.num_microbatches % s.group):
        return "micro-batches are no multiple of the group"
    return None


def _sharded(request: Request, base: Strategy) -> Iterator[Strategy | str]:
    for sharding, recompute in product(request.sharding or SHARDINGS, request.recompute or RECOMPUTES):
        reason = None
        if sharding in ("zero2", "zero3"):
            if base.schedule not in BREADTH_FIRST:
                reason = f"{sharding}: only with the breadth-first schedule"
            elif base.group < base.num_microbatches:  # a chunk would be gathered and reduced for each group
                reason = f"{sharding}: only with one group of all micro-batches"
            elif request.precision.startswith("fp8"):
                reason = f"{sharding}: not in the model with fp8"
            elif not request.hypothetical and request.precision == "fp16":
                reason = f"{sharding}: Megatron's FSDP2 has no fp16"
            elif not request.hypothetical and not request.gpt.untied:
                reason = f"{sharding}: Megatron's FSDP2 needs untied embeddings"
        if sharding == "replicated" and request.precision == "fp8-params" and base.dp > 1:
            reason = "fp8 parameters: only with the distributed optimizer"
        if sharding != "replicated" and base.dp == 1:
            reason = "sharding: one data-parallel rank"
        if recompute == "selective" and request.gpu.flash_attention:
            reason = "selective recomputation: saves nothing with flash attention"
        yield reason or replace(base, sharding=sharding, recompute=recompute)

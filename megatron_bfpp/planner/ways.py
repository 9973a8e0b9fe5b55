"""The ways to divide a model over GPUs that the search considers, and why others are not possible."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..schedule.lower import DEFAULT_HOP
from .hardware import GPU
from .memory import PRECISIONS
from .model import GPT
from .model.layouts import placings
from .strategy import BREADTH_FIRST, DEFERRED, SCHEDULES, SHARDINGS, Strategy, count_microbatches

__all__ = ["Request", "recomputations", "ways"]

LATE = "breadth-first-late"  # takes as long as the eager one and more memory, so it is not searched unless asked for
# Context parallelism leaves a rank so many tokens at least: with fewer, data parallelism does the same for less.
LEAST_TOKENS = 4096
_SEARCHED = ("cp", "ep", "etp", "modules")
_CHUNKS = (2, 3, 4, 6, 8)  # of a layout


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
    # What the search leaves as the flags have it, by the fields of a Strategy: exchanges, overlaps, bytes of the state.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    schedule: tuple[str, ...] = ()
    pp: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    etp: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    sharding: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()


class _Division(NamedTuple):
    """Sizes, in Megatron's order of ranks."""

    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    dp: int


def ways(request: Request) -> Iterator[tuple[float, Strategy | str]]:
    """Yield strategies without recomputation, or reasons why there are none, each with the part that is done."""
    pairs = list(_sizes(request))
    for done, (tp, cp, pp) in enumerate(pairs):
        for division in _divisions(request, tp, cp, pp):
            found = (division,) if isinstance(division, str) else _strategies(request, division)
            yield from ((done / len(pairs), each) for each in found)


def recomputations(request: Request, strategy: Strategy) -> Iterator[Strategy | str]:
    """Yield the strategy with each recomputation, the least first, or why it is left out.

    More makes a step longer, so the first that fits into memory is the fastest.
    """
    gpt, wanted = request.gpt, request.recompute or ("none", "selective", "full")
    for word in ("none", "selective", "full"):
        if word not in wanted:
            continue
        modules = [strategy.modules] if word != "selective" else _modules(request, strategy)
        if not modules:
            yield "selective recomputation: saves nothing with flash attention"
        for each in modules:
            times = gpt.times(word) if strategy.is_split else strategy.times
            yield replace(strategy, recompute=word, modules=each, times=times)


def _modules(request: Request, strategy: Strategy) -> list[tuple[str, ...]]:
    """Return what selective recomputation can make again, the least first; the attention alone saves nothing where a
    flash kernel makes it again anyway.
    """
    gpt = request.gpt
    if gpt.experts is None and gpt.latent is None:
        return [] if request.gpu.flash_attention else [strategy.modules]
    latent = ("mla_up_proj",) if gpt.latent is not None else ()
    experts = gpt.experts is not None
    core = () if request.gpu.flash_attention else ("core_attn",)
    least = (*core, "layernorm", *latent, *(("moe_act",) if experts else ()))
    return [least, (*core, "layernorm", *latent, *(("moe",) if experts else ()), "mlp")]


# Sizes


def _sizes(request: Request) -> Iterator[tuple[int, int, int]]:
    for tp in request.tp or _divisors(request.num_gpus, request.gpu.gpus_per_node):
        most = max(1, request.gpt.seq_length // LEAST_TOKENS)
        for cp in request.cp or [each for each in _divisors(request.num_gpus, most) if each & (each - 1) == 0]:
            for pp in request.pp or _divisors(max(1, request.num_gpus // (tp * cp)), request.gpt.num_layers):
                yield tp, cp, pp


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _divisions(request: Request, tp: int, cp: int, pp: int) -> Iterator[_Division | str]:
    reason = _indivisible(request, tp, cp, pp)
    if reason is not None:
        yield reason
        return
    dp, experts = request.num_gpus // (pp * tp * cp), request.gpt.experts
    if experts is None:
        yield _Division(tp, cp, pp, 1, 0, dp)
        return
    for etp in request.etp or sorted({1, tp}):
        for ep in request.ep or _divisors(experts.count, tp * cp * dp):
            if tp * cp * dp % (ep * etp) or experts.count % ep or experts.ffn % etp:
                yield "experts: ranks, experts or their width do not divide over EP x ETP"
                continue
            division = _Division(tp, cp, pp, ep, etp, dp)
            yield division if _may_fit(request, division) else "memory: the state alone is more than a GPU has"


def _may_fit(request: Request, d: _Division) -> bool:
    """Return whether parameters and gradients of an average rank fit, with its share of the experts' state."""
    gpt, kind = request.gpt, PRECISIONS[request.precision]
    own = gpt.routed_parameters / (d.pp * d.ep * d.etp)
    shared = kind.optimizer * own * d.ep * d.etp / (d.tp * d.cp * d.dp)
    others = (gpt.parameters - gpt.routed_parameters) / (d.pp * d.tp)
    return (kind.element + kind.gradient) * (own + others) + shared <= request.gpu.memory - request.reserve


def _indivisible(request: Request, tp: int, cp: int, pp: int) -> str | None:
    gpt = request.gpt
    if tp > request.gpu.gpus_per_node:
        return "TP: more ranks than GPUs in a node"
    keys = gpt.num_attention_heads if gpt.latent is not None else gpt.groups
    if gpt.num_attention_heads % tp or keys % tp or gpt.ffn % tp:
        return "TP: heads, query groups or the MLP's width do not divide"
    if request.num_gpus % (pp * tp * cp):
        return "GPUs are no multiple of PP x TP" + (" x CP" if cp > 1 else "")
    if cp > 1 and gpt.seq_length % (2 * cp):
        return "CP: the sequence does not divide in two parts for each rank"
    if request.global_batch % (request.num_gpus // (pp * tp * cp)):
        return "global batch is no multiple of DP"
    return None


# Strategies of given sizes


def _strategies(request: Request, d: _Division) -> Iterator[Strategy | str]:
    usual = (1, 2, 4, 8, 16) if request.gpt.experts is None else (1, 2, 4)
    for micro_batch in request.micro_batch or usual:
        count = count_microbatches(request.global_batch, d.dp, micro_batch)
        if count is None:
            if request.micro_batch or d.dp * micro_batch <= request.global_batch:
                yield "batch of a replica is no multiple of the micro-batch"
            continue
        for schedule in request.schedule or [each for each in SCHEDULES if each != LATE]:
            if (schedule == "no-pipeline") != (d.pp == 1):
                continue
            for chunks, group in _chunks_and_groups(request, schedule, d.pp, count):
                base = Strategy(
                    schedule, d.pp, d.tp, d.dp, chunks, micro_batch, count, group, hop=request.hop,
                    sequence_parallel=request.sequence_parallel, cp=d.cp, ep=d.ep, etp=d.etp,
                )  # fmt: skip
                reason = _refused(base, bool(request.group))
                if reason is not None:
                    yield reason
                    continue
                is_placed = False
                for layers, words in placings(request.gpt, d.pp, chunks, schedule in BREADTH_FIRST):
                    is_placed = True
                    placed = replace(_exchanging(request, base), stage_layers=layers, placing=words)
                    yield from _sharded(request, placed)
                if not is_placed:
                    yield "layers: fewer than stages"


def _exchanging(request: Request, base: Strategy) -> Strategy:
    """Return the strategy with the exchanges that the question names. Only Megatron's loop with chunks hides those of
    experts.
    """
    left = {name: value for name, value in request.fixed.items() if name not in _SEARCHED}
    left["overlaps_experts"] = left.get("overlaps_experts", False) and base.is_interleaved
    return replace(base, **left)


def _chunks_and_groups(request: Request, schedule: str, pp: int, count: int) -> Iterator[tuple[int, int]]:
    if schedule in ("no-pipeline", "1f1b"):
        if not request.chunks or 1 in request.chunks:
            yield 1, count
        return
    layers = request.gpt.num_layers
    possible = set(_divisors(layers // pp, layers)) if layers % pp == 0 else set()
    if layers % pp or schedule in BREADTH_FIRST or request.gpt.pattern:  # a layout or a pattern can say what is uneven
        possible |= {number for number in _CHUNKS if pp * number <= layers + 1}
    for chunks in request.chunks or sorted(possible):
        if chunks == 1:
            continue
        groups = request.group
        if not groups:
            fewer = [group for group in (pp, 2 * pp, 4 * pp) if group < count and count % group == 0]
            groups = {"interleaved": (pp,), "interleaved-grouped": (count,)}.get(schedule, (*fewer, count))
        yield from ((chunks, group) for group in groups)


def _refused(s: Strategy, is_group_given: bool) -> str | None:
    if s.is_interleaved:
        rest = s.num_microbatches % s.group
        if s.num_microbatches < s.pp or not s.pp <= s.group <= s.num_microbatches or 0 < rest < s.pp:
            return "Megatron's interleaved schedule refuses so few micro-batches"
        if s.schedule == "interleaved-grouped" and s.group == s.pp and not is_group_given:
            return "the same as interleaved: one group"
    if s.schedule in BREADTH_FIRST and (s.group > s.num_microbatches or s.num_microbatches % s.group):
        return "micro-batches are no multiple of the group"
    return None


# Sharding


def _sharded(request: Request, base: Strategy) -> Iterator[Strategy | str]:
    for sharding in request.sharding or SHARDINGS:
        times = request.gpt.times("none") if base.schedule == DEFERRED else base.times
        yield _sharding_refused(request, base, sharding) or replace(base, sharding=sharding, times=times)


def _sharding_refused(request: Request, base: Strategy, sharding: str) -> str | None:
    if sharding != "replicated" and base.replicas == 1:
        return "sharding: one data-parallel rank"
    if sharding == "replicated" and request.precision == "fp8-params" and base.replicas > 1:
        return "fp8 parameters: only with the distributed optimizer"
    if sharding in ("replicated", "zero1"):
        return None
    if base.schedule not in BREADTH_FIRST:
        return f"{sharding}: only with the breadth-first schedule"
    if base.group < base.num_microbatches:  # a chunk would be gathered and reduced for each group
        return f"{sharding}: only with one group of all micro-batches"
    if request.gpt.experts is not None or base.cp > 1:
        return f"{sharding}: not in the search with experts or context parallelism"
    if request.precision.startswith("fp8"):
        return f"{sharding}: not in the model with fp8"
    if not request.hypothetical and request.precision == "fp16":
        return f"{sharding}: Megatron's FSDP2 has no fp16"
    if not request.hypothetical and not request.gpt.untied:
        return f"{sharding}: Megatron's FSDP2 needs untied embeddings"
    if not request.hypothetical and (
        {"M", "G"} & {*request.gpt.pattern, *request.gpt.mtp_pattern} or any(request.gpt.delta_layers)
    ):
        return f"{sharding}: Megatron's checkpoints cannot hold it with Mamba layers or gated delta nets"
    return None

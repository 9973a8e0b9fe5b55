"""Bytes that a strategy needs on each pipeline rank: parameters, gradients, optimizer state, activations, messages.

replicated  Megatron's default: all of them on every data-parallel rank
zero1       Megatron's distributed optimizer: the optimizer state is divided by the data-parallel size
zero2       torch's FSDP2, parameters kept gathered: gradients are divided too, except those of the resident chunks
zero3       torch's FSDP2: everything is divided, except parameters and gradients of the resident chunks
megatron-fsdp   Megatron's own FSDP: everything is divided, except those of the layer that runs and of the next

The parameters of experts are on fewer ranks alike (tp * cp * dp / (ep * etp)), and are divided over these.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from .activations import Activations
from .model import GPT
from .model.stages import Stage
from .strategy import RESIDENT_CHUNKS, Strategy

__all__ = ["PRECISIONS", "Memory", "Precision", "memory"]


class Precision(NamedTuple):
    """Bytes per parameter with Adam as Megatron keeps it."""

    element: int  # parameters and activations
    gradient: int  # the buffer in which they are accumulated and reduced
    optimizer: int  # two moments in fp32, and an fp32 copy of the parameters unless they are fp32 themselves
    step: int  # only during the optimizer's step: fp32 copies of 16-bit gradients
    linear: int  # what a matrix product of a layer saves of its input
    copies: int = 0  # of a layer's parameters, kept beside them for the whole step
    gathered: int = 0  # a layer's parameters on the network; 0: as `element`


PRECISIONS = {
    "fp32": Precision(4, 4, 8, 0, linear=4),
    "bf16": Precision(2, 4, 12, 0, linear=2),  # Megatron accumulates the gradients of bf16 in fp32 by default
    "fp16": Precision(2, 2, 12, 4, linear=2),
    # The matrix products of the layers in fp8, everything else in bf16. Assumed, not measured, for Transformer Engine
    # on Hopper with one scale per tensor: weights in fp8 and, for the backward, transposed in fp8, made once a step;
    # inputs saved in fp8.
    "fp8": Precision(2, 4, 12, 0, linear=1, copies=2),
    # --fp8-param-gather: these two are the parameters, of a byte each; there is none in bf16.
    "fp8-params": Precision(2, 4, 12, 0, linear=1, gathered=1),
}


@dataclass(frozen=True)
class Memory:
    """The memory of one GPU of one pipeline rank, in bytes."""

    pp_rank: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    messages: float  # beside the activations
    working: float  # beside the activations, for one action at a time
    step: float  # for the optimizer's step, when the activations are gone
    owed: float = 0.0  # what owed weights' gradients keep, beside the activations of whole micro-batches

    @property
    def total(self) -> float:
        in_backwards = self.activations + self.owed + self.messages + self.working
        return self.parameters + self.gradients + self.optimizer + max(in_backwards, self.step)


def memory(gpt: GPT, strategy: Strategy, precision: Precision, flash_attention: bool, pp_rank: int) -> Memory:
    """Return the memory of one pipeline rank."""
    s, stages = strategy, strategy.stages(gpt)
    own = stages[pp_rank :: s.pp]
    is_first, is_last = pp_rank == 0, pp_rank == s.pp - 1
    live = Activations(
        gpt, s.micro_batch, s.tp, s.is_split_along_sequence, precision.element, flash_attention, precision.linear,
        cp=s.cp, ep=s.ep, etp=s.split.etp, modules=s.modules,
    )  # fmt: skip
    of_kinds, whole = (
        gpt.once((live, word), partial(_kept, live, word)) for word in (s.recompute, "none")
    )  # fmt: skip
    different, place = gpt.alike(own)
    each = [gpt.on_stage(stage, of_kinds) for stage in different]
    of_chunks = [each[number] for number in place]
    of_owed = 0.0
    if s.is_split:
        owed_of_kinds = gpt.once((live, "owed"), lambda: [live.owed(kind) for kind in gpt.kinds])
        of_owed = max(gpt.on_stage(stage, owed_of_kinds) for stage in different)
    at_once, owed_at_once = s.peak_owing(pp_rank, max(of_chunks), of_owed)
    # Which chunks the live ones are of: a group of each but the last, and the rest of the one that keeps most.
    early = sum(of_chunks[:-1]) * min(s.group, at_once // max(1, s.chunks - 1))
    rest = at_once - (s.chunks - 1) * min(s.group, at_once // max(1, s.chunks - 1))
    activations, owed = early + rest * max(of_chunks), owed_at_once * of_owed
    if is_first:
        activations += min(at_once, s.num_microbatches) * live.embedding()
    messages = s.peak_messages(pp_rank) * live.message
    working = max(all_of - kept for all_of, kept in zip(whole, of_kinds, strict=True))
    if is_last:
        activations += s.live_logits * live.head()
        owed += min(owed_at_once, s.num_microbatches) * live.owed_head()
        working = max(working, live.head_working())
    held = gpt.once((own, s.split), lambda: _held(gpt, s, own))
    divided = held.dense / s.replicas + held.experts / s.expert_replicas
    at_step = precision.step * (held.dense + held.experts if s.sharding == "replicated" else divided)
    return Memory(pp_rank, *_state(s, precision, held, divided), activations, messages, working, at_step, owed)


def _kept(live: Activations, recompute: str) -> list[float]:
    return [live.layer(recompute, kind) for kind in live.gpt.kinds]


class _Held(NamedTuple):
    """The parameters that a rank has to hold."""

    dense: int
    experts: int
    in_fp8: float  # where the job uses it
    ends: float
    largest_layer: float
    largest_chunk: float


def _held(gpt: GPT, s: Strategy, own: tuple[Stage, ...]) -> _Held:
    each = [sum(both) for both in zip(*gpt.sizes(s.split), strict=True)]
    in_fp8 = [size if kind.is_fp8 else 0 for kind, size in zip(gpt.kinds, each, strict=True)]
    dense = sum(gpt.stage_parameters(stage, s.tp) for stage in own)
    experts = sum(gpt.stage_expert_parameters(stage, s.split) for stage in own)
    of_chunks = [gpt.on_stage(stage, each) for stage in own]
    ends = dense + experts - sum(of_chunks)
    return _Held(
        dense, experts, sum(gpt.on_stage(stage, in_fp8) for stage in own), ends, max(each), max(of_chunks)
    )  # fmt: skip


def _state(s: Strategy, precision: Precision, held: _Held, divided: float) -> tuple[float, float, float]:
    """Return the bytes of parameters, gradients and optimizer state. divided: parameters of a rank's share."""
    count, element = held.dense + held.experts, precision.element
    gradient, optimizer = s.gradient_bytes or precision.gradient, s.optimizer_bytes or precision.optimizer
    if s.sharding in ("replicated", "zero1"):
        weights = element * count + precision.copies * held.in_fp8
        return weights, gradient * count, optimizer * (divided if s.sharding == "zero1" else count)
    if s.is_sharded_by_layer:
        # One layer runs, or reduces its gradients, while the next is gathered. The ends are gathered as a whole.
        gathered = summed = min(count, 2 * held.largest_layer + held.ends)
    else:
        # At the peak one chunk has ended its backward, is given up, and reduces its gradients while the next makes its
        # own. The embedding is in the first chunk, the head in the last: at most one of them is among these.
        gathered = min(s.resident_chunks or 0, max(1, s.chunks - 1)) * held.largest_chunk + held.ends
        summed = min(count, RESIDENT_CHUNKS * held.largest_chunk + held.ends)
    # FSDP2 adds up and hands over gradients in fp32; Megatron's FSDP makes them as the parameters are.
    made = element if s.sharding == "megatron-fsdp" else 4
    return element * (gathered + divided), made * summed + 4 * divided, optimizer * divided

"""Bytes that a strategy needs on each pipeline rank: parameters, gradients, optimizer state, activations, messages.

replicated  Megatron's default: all of them on every data-parallel rank
zero1       Megatron's distributed optimizer: the optimizer state is divided by the data-parallel size
zero2       torch's FSDP2, parameters kept gathered: gradients are divided too, except those of the resident chunks
zero3       torch's FSDP2: everything is divided, except parameters and gradients of the resident chunks
"""

from dataclasses import dataclass
from typing import NamedTuple

from .activations import Activations
from .model import GPT
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
    s, is_first, is_last = strategy, pp_rank == 0, pp_rank == strategy.pp - 1
    per_chunk = gpt.num_layers // (s.pp * s.chunks)
    ends = gpt.embedding_parameters(s.tp) if is_first else 0
    ends += gpt.head_parameters(s.tp, s.pp == 1) if is_last else 0
    chunk = per_chunk * gpt.layer_parameters(s.tp)
    count = chunk * s.chunks + ends
    # At the peak one chunk has ended its backward, is given up, and reduces its gradients while the next makes its own.
    # The embedding is in the first chunk, the head in the last: at most one of them is among these.
    gathered = min(s.resident_chunks or 0, max(1, s.chunks - 1)) * chunk + ends
    summed = min(count, RESIDENT_CHUNKS * chunk + ends)
    divided = count / s.dp
    element, gradient, optimizer, step = precision[:4]
    weights = element * count + precision.copies * chunk * s.chunks
    # Under FSDP2 gradients are added up and handed over in fp32.
    divided_by_fsdp2 = (element * (gathered + divided), 4 * (summed + divided), optimizer * divided)
    stored: dict[str, tuple[float, float, float]] = {
        "replicated": (weights, gradient * count, optimizer * count),
        "zero1": (weights, gradient * count, optimizer * divided),
    }
    of_state = stored.get(s.sharding, divided_by_fsdp2)
    split = s.is_split_along_sequence
    live = Activations(gpt, s.micro_batch, s.tp, split, element, flash_attention, linear=precision.linear)
    of_chunk, of_owed = per_chunk * live.layer(s.recompute), per_chunk * live.owed()
    at_once, owed_at_once = s.peak_owing(pp_rank, of_chunk, of_owed)
    activations, owed = at_once * of_chunk, owed_at_once * of_owed
    if is_first:
        activations += min(at_once, s.num_microbatches) * live.embedding()
    messages = s.peak_messages(pp_rank) * live.message
    working = live.working(s.recompute)
    if is_last:
        activations += s.live_logits * live.head()
        owed += min(owed_at_once, s.num_microbatches) * live.owed_head()
        working = max(working, live.head_working())
    at_step = step * (count if s.sharding == "replicated" else divided)
    return Memory(pp_rank, *of_state, activations, messages, working, at_step, owed)

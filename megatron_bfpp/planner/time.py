"""Durations of the parts of a step on one GPU: forward and backward of a stage, messages, data-parallel collectives.

a stage      Matrix products at the speed that the GPU achieves on their size; other kernels by the bytes they move;
             two all-reduces of tensor parallelism forward and two backward, or with sequence parallelism gathers and
             scatters of as many bytes. They stand between the products and are not overlapped.
fp8          Only for the products of the layers, at the same achieved part of its peak; attention, logits and messages
             stay in bf16, and other kernels move as much as in bf16: the casts are among them.
a backward   Twice the products, and what is recomputed. Its W, where it is split, is one product of each linear layer,
             of the output layer too unless it is tied; all else belongs to its I. To run the two apart is free here.
a message    A layer's output, for each pair of neighbours within a node or over the network. Megatron numbers the
             tensor ranks first, then data, then pipeline: a pipeline rank is tp * dp GPUs in a row.
a collective The parameters or gradients of a chunk, over data-parallel ranks that are tp apart. Over the network it
             shares the card with the messages.
"""

from dataclasses import dataclass, replace

from ..schedule.costs import Costs
from .activations import Activations
from .hardware import GPU, beside_products
from .memory import PRECISIONS
from .model import GPT
from .strategy import BREADTH_FIRST, Strategy

__all__ = ["Durations", "durations"]

# How often kernels other than matrix products read or write what a layer stores: they write it, the next kernel reads
# it, and about once more in between. An assumption; such kernels are a tenth of a large layer.
PASSES = 3
# Bytes that Adam reads and writes for a parameter: gradient, moments and master copy in fp32, the new one in 16 bits.
OPTIMIZER_TRAFFIC = 30
# Megatron's buckets in parameters: max(40 million, 1 million x data-parallel size). They overlap a reduction with the
# backward that makes it.
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Durations(Costs):
    """Durations in seconds, with the parts of a step that its plan does not have."""

    forward: list[float]  # of one micro-batch on each stage in order
    backward: list[float]
    tensor_parallel: float  # of a stage's forward and backward together, contained in them
    ends: float  # reduction and gather of the embedding, which comes last
    optimizer: float


def durations(gpt: GPT, strategy: Strategy, gpu: GPU, precision: str, overlap: bool = True) -> Durations:
    """Estimate the parts of a step. overlap: if False, Megatron's schedules wait for every message and for all
    data-parallel traffic, as before 2023.
    """
    s, element = strategy, PRECISIONS[precision].element
    live = Activations(gpt, s.micro_batch, s.tp, s.is_split_along_sequence, element, gpu.flash_attention)
    layer = _Layer(gpt, s, gpu, precision, live)
    layers = gpt.num_layers // (s.pp * s.chunks)
    stages = s.pp * s.chunks
    forward, backward = [layers * layer.forward] * stages, [layers * layer.backward] * stages
    head = gpu.gemm_s(gpt.head_gemm(s.micro_batch, s.tp), beside_products(precision))
    softmax = PASSES * live.head() / gpu.memory_bytes_per_s
    weights = [layers * layer.weights] * stages
    weights[-1] += head if gpt.untied else 0.0
    forward[-1] += head + softmax
    backward[-1] += 2 * head + softmax
    crosses = gpu.crosses(s.tp * s.dp, s.pp)
    links = [gpu.network_link if each else gpu.node_link for each in crosses]
    gather, reduction, ends = _collectives(gpt, s, gpu, precision)
    owned = gpt.num_layers // s.pp * gpt.layer_parameters(s.tp) + gpt.embedding_parameters(s.tp)
    owned //= 1 if s.sharding == "replicated" else s.dp
    times = Durations(
        forward=forward, backward=backward, weights=weights, tensor_parallel=layers * layer.tensor_parallel,
        hop=[each.latency_s for each in links], transfer=[live.message / each.bytes_per_s for each in links],
        gather=gather, reduction=reduction, ends=ends,
        buckets=_buckets(s, layers, layers * gpt.layer_parameters(s.tp)),
        optimizer=owned * OPTIMIZER_TRAFFIC / gpu.memory_bytes_per_s,
        shared_card=[each and s.dp > 1 and not gpu.is_in_node(s.tp, s.dp, s.num_gpus) for each in crosses],
    )  # fmt: skip
    return times if overlap or s.schedule in BREADTH_FIRST else _blocking(s, times)


def _blocking(s: Strategy, times: Durations) -> Durations:
    """Move messages into the actions that exchange them, and gathers and reductions to the two ends of the step.

    A rank exchanges once for each forward of its warm-up and backward of its cool-down, and once for each pair between.
    """
    total = s.chunks * s.num_microbatches
    message = max(times.messages(s.pp)) * (1 + s.peak_live(0) / total) / 2 if s.pp > 1 else 0.0
    forward, backward = ([each + message for each in stages] for stages in (times.forward, times.backward))
    ends = times.ends + s.chunks * (times.gather + times.reduction)
    return replace(
        times, forward=forward, backward=backward, hop=0.0, transfer=0.0, gather=0.0, reduction=0.0, ends=ends
    )


def _buckets(s: Strategy, layers: int, parameters: int) -> int:
    """Count the parts in which a chunk is gathered or reduced: layers of FSDP2, buckets of Megatron. Megatron's loop
    with chunks launches the reduction of a chunk as a whole.
    """
    if s.resident_chunks is not None:
        return layers
    return 1 if s.is_interleaved else max(1, parameters // max(BUCKET, BUCKET_PER_RANK * s.dp))


class _Layer:
    """Forward and backward of one layer, in seconds."""

    def __init__(self, gpt: GPT, s: Strategy, gpu: GPU, precision: str, live: Activations):
        products = sum(gpu.gemm_s(gemm, precision) for gemm in gpt.layer_gemms(s.micro_batch, s.tp))
        beside = beside_products(precision)
        attention = sum(gpu.gemm_s(gemm, beside) for gemm in gpt.attention_gemms(s.micro_batch, s.tp))
        if gpu.flash_attention:  # which skips the half that the causal mask hides
            attention /= 2
        square = PASSES * (live.layer("none") - live.layer("selective")) / gpu.memory_bytes_per_s
        others = PASSES * live.layer("selective") / gpu.memory_bytes_per_s
        # Two all-reduces, each as long as two gathers.
        whole = live.message * (s.tp if s.is_split_along_sequence else 1)
        exchanged = 4 * gpu.link(1, s.tp, s.num_gpus).all_gather_s(whole, s.tp)
        self.weights = products
        self.forward = products + attention + square + others + exchanged
        again = {"none": 0.0, "selective": attention + square, "full": self.forward}[s.recompute]
        self.backward = 2 * (products + attention + square + others) + exchanged + again
        self.tensor_parallel = exchanged * (3 if s.recompute == "full" else 2)


def _collectives(gpt: GPT, s: Strategy, gpu: GPU, precision: str) -> tuple[float, float, float]:
    """Return the times of gather and reduction of a chunk, and of both for the embedding."""
    element, gradient = PRECISIONS[precision][:2]
    gathered = PRECISIONS[precision].gathered or element
    link = gpu.link(s.tp, s.dp, s.num_gpus)
    layers = gpt.num_layers // (s.pp * s.chunks) * gpt.layer_parameters(s.tp)
    words = gpt.embedding_parameters(s.tp)

    def both(parameters: int, element: int) -> tuple[float, float]:
        scattered = link.all_gather_s(gradient * parameters, s.dp)
        if s.sharding == "replicated":
            return 0.0, 2 * scattered
        return link.all_gather_s(element * parameters, s.dp), scattered

    gather, reduction = both(layers, gathered)
    return gather, reduction, sum(both(words, element))

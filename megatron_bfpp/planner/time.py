"""Durations of the parts of a step on one GPU: forward and backward of a stage, messages, data-parallel collectives.

a stage      Matrix products at the speed that the GPU achieves on their size; other kernels by the bytes they move;
             what the ranks of a layer exchange (layer_time.py). Each stage has the layers that are placed on it.
fp8          Only for the products of the layers, at the same achieved part of its peak; attention, logits and messages
             stay in bf16, and other kernels move as much as in bf16: the casts are among them.
a backward   Twice the products, and what is recomputed. Its W, where it is split, is one product of each linear layer,
             of the output layer too unless it is tied; all else belongs to its I. To run the two apart is free here.
a message    A layer's output, for each pair of neighbours within a node or over the network. Megatron numbers the
             tensor ranks first, then context, data and pipeline: a pipeline rank is tp * cp * dp GPUs in a row.
a collective The parameters or gradients of a chunk, over data-parallel (and context-parallel) ranks that are tp
             apart, those of experts over fewer; as long as the longest chunk's. Over the network it shares the card
             with the messages. FSDP without this plugin's plan gathers and reduces for every micro-batch instead.
"""

from dataclasses import dataclass, replace

from ..schedule.costs import Costs
from .activations import Activations
from .hardware import GPU, beside_products
from .layer_time import PASSES, LayerTime
from .memory import PRECISIONS
from .model import GPT
from .model.stages import Stage
from .strategy import BREADTH_FIRST, Strategy

__all__ = ["Durations", "durations"]

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
    s, kind = strategy, PRECISIONS[precision]
    live = Activations(
        gpt, s.micro_batch, s.tp, s.is_split_along_sequence, kind.element, gpu.flash_attention, cp=s.cp,
        ep=s.ep, etp=s.split.etp, modules=s.modules,
    )  # fmt: skip
    stages = s.stages(gpt)
    layers = [LayerTime(gpt, s, gpu, precision, live, layer) for layer in gpt.kinds]
    different, place = gpt.alike(stages)
    of_alike = [_Chunk(gpt, s, gpu, precision, stage, layers) for stage in different]
    chunks = [of_alike[number] for number in place]
    forward, backward, weights = (
        [getattr(chunk, part) for chunk in chunks] for part in ("forward", "backward", "weights")
    )
    gather, reduction, exchanged, parameters = (
        max(getattr(chunk, part) for chunk in of_alike) for part in ("gather", "reduction", "exchanged", "parameters")
    )
    if s.is_sharded_by_layer:  # as each layer of each micro-batch needs it, beside the layer before
        forward = [max(each) for each in zip(forward, (chunk.gather for chunk in chunks), strict=True)]
        both = (chunk.gather + chunk.reduction for chunk in chunks)
        backward = [max(each) for each in zip(backward, both, strict=True)]
        gather = reduction = 0.0
    head = gpu.gemm_s(gpt.head_gemm(s.micro_batch, s.split), beside_products(precision))
    softmax = PASSES * live.head() / gpu.memory_bytes_per_s
    weights[-1] += head if gpt.untied else 0.0
    forward[-1] += head + softmax
    backward[-1] += 2 * head + softmax
    crosses = gpu.crosses(s.tp * s.replicas, s.pp)
    links = [gpu.network_link if each else gpu.node_link for each in crosses]
    of_ranks = [sum(chunk.owned for chunk in chunks[rank :: s.pp]) for rank in range(s.pp)]
    times = Durations(
        forward=forward, backward=backward, weights=weights, tensor_parallel=exchanged,
        hop=[each.latency_s for each in links], transfer=[live.message / each.bytes_per_s for each in links],
        gather=gather, reduction=reduction, ends=_ends(gpt, s, gpu, precision),
        buckets=_buckets(s, max(stage.layers for stage in stages), parameters),
        optimizer=max(of_ranks) * OPTIMIZER_TRAFFIC / gpu.memory_bytes_per_s,
        shared_card=[
            each and s.replicas > 1 and not gpu.is_in_node(s.tp, s.replicas, s.num_gpus) for each in crosses
        ],
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


class _Chunk:
    """A stage's layers: their forward and backward, and their data-parallel gather and reduction, in seconds."""

    def __init__(self, gpt: GPT, s: Strategy, gpu: GPU, precision: str, stage: Stage, layers: list[LayerTime]):
        self.forward, self.backward, self.weights, self.exchanged = (
            gpt.on_stage(stage, [getattr(layer, part) for layer in layers])
            for part in ("forward", "backward", "weights", "exchanged")
        )
        dense, experts = (int(gpt.on_stage(stage, sizes)) for sizes in gpt.sizes(s.split))
        split = s.split
        parts = [_collectives(s, gpu, precision, dense, s.tp, s.replicas)]
        if experts:
            parts.append(_collectives(s, gpu, precision, experts, split.etp * split.ep, s.expert_replicas))
        self.gather, self.reduction = (sum(each) for each in zip(*parts, strict=True))
        self.parameters = dense + experts
        whole = gpt.stage_parameters(stage, s.tp)
        is_whole = s.sharding == "replicated"
        self.owned = whole + experts if is_whole else whole / s.replicas + experts / s.expert_replicas


def _collectives(
    s: Strategy, gpu: GPU, precision: str, parameters: int, first: int, ranks: int, gathered: int = 0
) -> tuple[float, float]:
    """Return the times of gather and reduction over `ranks` ranks that are `first` apart. gathered: bytes."""
    link, kind = gpu.link(first, ranks, s.num_gpus), PRECISIONS[precision]
    scattered = link.all_gather_s((s.gradient_bytes or kind.gradient) * parameters, ranks)
    if s.sharding == "replicated":
        return 0.0, 2 * scattered
    element = gathered or kind.gathered or kind.element
    return link.all_gather_s(element * parameters, ranks), scattered


def _ends(gpt: GPT, s: Strategy, gpu: GPU, precision: str) -> float:
    """Return the time of both for the embedding, whose parameters are never in fp8."""
    element = PRECISIONS[precision].element
    return sum(_collectives(s, gpu, precision, gpt.embedding_parameters(s.tp), s.tp, s.replicas, element))

"""One way to divide a model and a batch over GPUs: sizes, schedule, sharding, recomputation, and the flags for it."""

from dataclasses import dataclass
from functools import cached_property

from ..schedule import PipelineShape, Schedule
from ..schedule.costs import EQUAL, Times
from ..schedule.lower import DEFAULT_HOP
from ..schedule.names import DEFERRED, ORDERS, order_of
from ..schedule.names import SCHEDULES as NAMED
from ..schedule.orders import weight_lags
from ..schedule.plan import choose_weight_lags
from .activations.rank import CORE
from .model import GPT, Split
from .model.stages import Stage, stages_of

__all__ = [
    "BREADTH_FIRST",
    "DEFERRED",
    "RECOMPUTES",
    "RESIDENT_CHUNKS",
    "SCHEDULES",
    "SHARDINGS",
    "Strategy",
    "count_microbatches",
]

# no-pipeline: one pipeline rank, which accumulates gradients.
SCHEDULES = ("no-pipeline", *ORDERS)
BREADTH_FIRST = ("breadth-first", "breadth-first-late", DEFERRED)
RECOMPUTES = ("none", "selective", "full")
# zero3: one chunk runs while the next is gathered. Both shardings by FSDP2: one chunk reduces its gradients while the
# next makes its own.
RESIDENT_CHUNKS = 2
# Tensors of messages on a rank at a time: two windows of sends, receives that are posted ahead, a gradient in use.
MOST_MESSAGES, MOST_MESSAGES_OF_1F1B = 8, 5
BLACKWELL = 10  # compute capability

_FSDP2 = [flag for flag in NAMED["breadth-first-sharded"].flags if flag not in NAMED["breadth-first"].flags]
_SHARDING_FLAGS = {  # zero1 is Megatron's distributed optimizer; zero2 and zero3 are torch's FSDP2, per chunk
    "replicated": ["--overlap-grad-reduce"],
    "zero1": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    "zero2": _FSDP2,
    "zero3": _FSDP2,
}
SHARDINGS = tuple(_SHARDING_FLAGS)
_SHARDING_FLAGS["megatron-fsdp"] = [
    "--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params", "--overlap-grad-reduce",
    "--overlap-param-gather", "--ckpt-format", "fsdp_dtensor",
]  # fmt: skip
_RECOMPUTE_FLAGS = {
    "none": [],
    "selective": ["--recompute-granularity", "selective"],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
}


def count_microbatches(global_batch: int, dp: int, micro_batch: int) -> int | None:
    """Count the micro-batches of a step on each replica; None where they do not divide the batch."""
    return None if global_batch % (dp * micro_batch) else global_batch // (dp * micro_batch)


@dataclass(frozen=True)
class Strategy:
    """Sizes as Megatron names them."""

    schedule: str
    pp: int
    tp: int
    dp: int
    chunks: int
    micro_batch: int  # sequences
    num_microbatches: int  # per step and replica
    group: int  # micro-batches that run through a chunk before the next; num_microbatches where there is one chunk
    sharding: str = "zero1"
    recompute: str = "none"
    sequence_parallel: bool = True  # where tp > 1
    hop: float = DEFAULT_HOP  # for which receives are placed: --breadth-first-hop
    weight_lag: int | None = None  # --breadth-first-weight-lag
    times: Times = EQUAL  # f, i and w, as the plugin estimates them to choose the lags
    cp: int = 1
    ep: int = 1
    etp: int = 0  # ranks that share an expert; 0: tp, Megatron's default
    cp_exchange: str = "p2p"  # or a2a or all_gather: --cp-comm-type
    overlaps_experts: bool = False  # --overlap-moe-expert-parallel-comm
    overlaps_shared: bool = False  # --moe-shared-expert-overlap
    overlaps_tensor: bool = False  # --tp-comm-overlap
    dispatcher: str = "alltoall"  # or flex or allgather: --moe-token-dispatcher-type
    modules: tuple[str, ...] = CORE  # what selective recomputation makes again
    gradient_bytes: int = 0  # of a parameter; 0: what its precision has
    optimizer_bytes: int = 0  # of a parameter's state; 0: what its precision has
    stage_layers: tuple[int, ...] = ()  # decoder layers of each stage in order; (): they divide evenly
    mtp_stage: int = -1
    placing: tuple[str, ...] = ()  # the flags that say so

    @property
    def num_gpus(self) -> int:
        return self.pp * self.tp * self.cp * self.dp

    @property
    def split(self) -> Split:
        """How the ranks share a layer."""
        return Split(self.tp, self.cp, self.ep, self.etp or self.tp)

    @property
    def replicas(self) -> int:
        """Ranks with the same parameters, those of experts aside; context parallelism has the same on each rank."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same parameters of experts."""
        return self.tp * self.cp * self.dp // (self.split.ep * self.split.etp)

    def stages(self, gpt: GPT) -> tuple[Stage, ...]:
        """The stages of the pipeline in order; stage = chunk * pp + pp_rank."""
        count = self.pp * self.chunks
        layers = self.stage_layers or (gpt.num_layers // count,) * count
        return stages_of(layers, gpt.mtp_layers and len(gpt.predictions), self.mtp_stage)

    @property
    def global_batch(self) -> int:
        return self.dp * self.micro_batch * self.num_microbatches

    @property
    def is_split_along_sequence(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def is_interleaved(self) -> bool:
        """True for the two schedules of Megatron's loop with chunks."""
        return self.schedule.startswith("interleaved")

    @property
    def shape(self) -> PipelineShape:
        """The shape of the step, for pp >= 2."""
        return PipelineShape(self.pp, self.chunks, self.num_microbatches)

    def order(self) -> Schedule:
        """Make the order of a step, for pp >= 2. Raises UserError for what Megatron refuses."""
        lags = self.chosen_lags() if self.is_split else None
        return order_of("interleaved" if self.is_interleaved else self.schedule, self.shape, self.group, lags)

    @property
    def is_split(self) -> bool:
        """True where the weights' gradients are deferred."""
        return self.schedule == DEFERRED

    def chosen_lags(self) -> tuple[int, ...]:
        """Return how many micro-batches await their W on each rank, as the plugin chooses it."""
        forward, inputs, weights = self.times
        return choose_weight_lags(
            self.shape, self.group, True, most=self.weight_lag, hop=self.hop * forward, inputs=inputs, weights=weights,
            forward=forward,
        )  # fmt: skip

    @cached_property
    def most_lags(self) -> list[int]:
        """The largest of the lags from which the plugin chooses, for each rank."""
        forward, inputs, weights = self.times
        return weight_lags(self.shape, self.weight_lag, self.hop * forward, inputs, weights)

    def peak_live(self, pp_rank: int) -> int:
        """Count the pairs of chunk and micro-batch that await their backward at the peak; exact if groups divide M."""
        behind, total = self.pp - pp_rank - 1, self.num_microbatches * self.chunks
        if self.schedule == "no-pipeline":
            return 1
        if self.schedule == "1f1b":
            return min(total, behind + 1)
        ahead = (self.chunks - (self.schedule != "breadth-first-late")) * self.group
        lead = min(behind, self.group) if self.schedule in BREADTH_FIRST else behind
        return min(total, ahead + 2 * lead + 1)

    def peak_owing(self, pp_rank: int, live: float, owed: float) -> tuple[int, int]:
        """Count the pairs of chunk and micro-batch that await their backward, and those that await their W alone.

        At the moment at which a rank holds most, where the first take `live` and the second `owed` bytes each. A
        backward starts with all of both; until its W, it leaves one live activation less and owes one W more. In the
        steady state each backward follows a forward, so its rank owes the more, up to the lag, with as many live.
        """
        most, total = self.peak_live(pp_rank), self.num_microbatches * self.chunks
        if not self.is_split:
            return most, 0
        lag = self.most_lags[pp_rank]
        moments = []
        # Before backward n, counted from 0: both numbers change their slope at these alone.
        for n in {0, min(lag, total - 1), total - most, total - 1}:
            waiting, owing = min(most, total - n), min(n, lag)
            moments += [(waiting, owing), (waiting - 1, owing + 1)]
        return max(moments, key=lambda each: each[0] * live + each[1] * owed)

    def peak_messages(self, pp_rank: int) -> int:
        """Bound the tensors that a rank holds for messages at a time, as `schedule.plan.most_messages` counts them.

        Inputs of the next chunk come to the first rank, and gradients of the chunk before to the last one, while the
        last group - pp micro-batches of this chunk run.
        """
        if self.pp == 1:
            return 0
        early = self.group - self.pp if self.chunks > 1 and pp_rank in (0, self.pp - 1) else 0
        return max(0, early) + (MOST_MESSAGES if self.chunks > 1 else MOST_MESSAGES_OF_1F1B)

    @property
    def resident_chunks(self) -> int | None:
        """The number of chunks whose parameters are gathered at one time; None where they are not sharded."""
        return {"zero2": self.chunks, "zero3": min(self.chunks, RESIDENT_CHUNKS)}.get(self.sharding)

    @property
    def is_sharded_by_layer(self) -> bool:
        """True where each layer is gathered for every forward and backward: FSDP without this plugin's plan."""
        return self.sharding == "megatron-fsdp" or (self.sharding == "zero3" and self.schedule not in BREADTH_FIRST)

    def connections(self, compute_capability: float) -> int:
        """Return CUDA_DEVICE_MAX_CONNECTIONS: 1 where Megatron demands it, else a hardware queue for each stream.

        Megatron demands 1 with tensor parallelism before Blackwell, except with FSDP2, which it refuses with 1.
        """
        return 1 if self.tp > 1 and compute_capability < BLACKWELL and self.resident_chunks is None else 32

    @property
    def live_logits(self) -> int:
        """The micro-batches whose logits the last rank holds at one time; all of a group if backwards come late."""
        return self.group if self.schedule == "breadth-first-late" else 1

    def flags(self) -> list[str]:
        """Return the flags of Megatron and of this plugin, without the model's."""
        words = [
            *("--tensor-model-parallel-size", self.tp, "--pipeline-model-parallel-size", self.pp),
            *("--micro-batch-size", self.micro_batch, "--global-batch-size", self.global_batch),
        ]
        if self.is_split_along_sequence:
            words.append("--sequence-parallel")
        words += ["--context-parallel-size", self.cp] if self.cp > 1 else []
        words += ["--expert-model-parallel-size", self.ep] if self.ep > 1 else []
        words += ["--expert-tensor-parallel-size", self.etp] if self.etp not in (0, self.tp) else []
        words += ["--cp-comm-type", self.cp_exchange] if self.cp > 1 and self.cp_exchange != "p2p" else []
        words += ["--moe-token-dispatcher-type", self.dispatcher] if self.ep > 1 else []
        words += ["--overlap-moe-expert-parallel-comm"] if self.overlaps_experts else []
        words += ["--moe-shared-expert-overlap"] if self.overlaps_shared else []
        words += ["--tp-comm-overlap"] if self.overlaps_tensor and self.tp > 1 else []
        words += self.placing
        if self.chunks > 1 and not self.placing:
            words += ["--num-virtual-stages-per-pipeline-rank", self.chunks]
        if self.is_interleaved:
            if self.schedule == "interleaved-grouped" or self.group != self.pp:
                words += ["--microbatch-group-size-per-virtual-pipeline-stage", self.group]
            words.append("--overlap-p2p-communication-warmup-flush")
        if self.schedule in BREADTH_FIRST:
            words += NAMED[self.schedule].flags
            words += ["--breadth-first-group-size", self.group] if self.group < self.num_microbatches else []
            words += ["--breadth-first-hop", f"{self.hop:g}"] if self.hop != DEFAULT_HOP else []
            words += ["--breadth-first-weight-lag", self.weight_lag] if self.weight_lag is not None else []
        sharding = _SHARDING_FLAGS[self.sharding] if self.dp > 1 or self.sharding != "replicated" else []
        # Without chunks each rank would gather only as its first micro-batch arrives; better all at once before that.
        words += [word for word in sharding if self.schedule != "1f1b" or word != "--overlap-param-gather"]
        if self.sharding == "zero2":
            words += ["--breadth-first-resident-chunks", self.chunks]
        words += _RECOMPUTE_FLAGS[self.recompute]
        if self.recompute == "selective" and self.modules != CORE:
            words += ["--recompute-modules", *self.modules]
        return [str(word) for word in words]

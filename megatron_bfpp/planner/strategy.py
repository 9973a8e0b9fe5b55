"""One way to divide a model and a batch over GPUs: sizes, schedule, sharding, recomputation, and the flags that say so.

Standard library and schedule/ only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule import PipelineShape, Schedule, breadth_first, interleaved_1f1b, one_f_one_b

__all__ = ["BREADTH_FIRST", "RECOMPUTES", "RESIDENT_CHUNKS", "SCHEDULES", "SHARDINGS", "Strategy"]

# no-pipeline: one pipeline rank, gradients accumulated. The others as in `bfpp bench`: Megatron's schedule without chunks,
# its default with chunks, the same with a group of all micro-batches, and this plugin's with either backward.
SCHEDULES = ("no-pipeline", "1f1b", "interleaved", "interleaved-grouped", "breadth-first", "breadth-first-late")
BREADTH_FIRST = ("breadth-first", "breadth-first-late")
# zero1 is Megatron's distributed optimizer; zero2 and zero3 are torch's FSDP2, per chunk.
SHARDINGS = ("replicated", "zero1", "zero2", "zero3")
RECOMPUTES = ("none", "selective", "full")
# zero3: one chunk runs while the next is gathered. Gradients of all shardings by FSDP2: one chunk reduces its own while the next makes its.
RESIDENT_CHUNKS = 2


@dataclass(frozen=True)
class Strategy:
    """Sizes as Megatron names them. The layers divide evenly over pp * chunks stages."""

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

    @property
    def num_gpus(self) -> int:
        return self.pp * self.tp * self.dp

    @property
    def global_batch(self) -> int:
        return self.dp * self.micro_batch * self.num_microbatches

    @property
    def is_split_along_sequence(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def shape(self) -> PipelineShape:
        """For pp >= 2."""
        return PipelineShape(self.pp, self.chunks, self.num_microbatches)

    def order(self) -> Schedule:
        """For pp >= 2. ValueError for what Megatron refuses."""
        if self.schedule == "1f1b":
            return one_f_one_b(self.shape)
        if self.schedule in BREADTH_FIRST:
            return breadth_first(self.shape, self.group, eager_backward=self.schedule == "breadth-first")
        return interleaved_1f1b(self.shape, self.group)

    def peak_live(self, pp_rank: int) -> int:
        """Chunks times micro-batches that await their backward at one time, at most; exact for groups that divide M."""
        behind, total = self.pp - pp_rank - 1, self.num_microbatches * self.chunks
        if self.schedule == "no-pipeline":
            return 1
        if self.schedule == "1f1b":
            return min(total, behind + 1)
        ahead = (self.chunks - (self.schedule != "breadth-first-late")) * self.group
        lead = min(behind, self.group) if self.schedule in BREADTH_FIRST else behind
        return min(total, ahead + 2 * lead + 1)

    @property
    def resident_chunks(self) -> int | None:
        """Whose parameters are gathered at one time; None where they are not sharded."""
        return {"zero2": self.chunks, "zero3": min(self.chunks, RESIDENT_CHUNKS)}.get(self.sharding)

    @property
    def live_logits(self) -> int:
        """Micro-batches whose logits the last rank holds at one time: each backward follows its forward, or a group of them."""
        return self.group if self.schedule == "breadth-first-late" else 1

    def flags(self) -> list[str]:
        """Of Megatron and of this plugin, without the model's."""
        words = [
            *("--tensor-model-parallel-size", self.tp, "--pipeline-model-parallel-size", self.pp),
            *("--micro-batch-size", self.micro_batch, "--global-batch-size", self.global_batch),
        ]
        if self.is_split_along_sequence:
            words.append("--sequence-parallel")
        if self.chunks > 1:
            words += ["--num-virtual-stages-per-pipeline-rank", self.chunks]
        if self.schedule == "interleaved-grouped" or (self.schedule == "interleaved" and self.group != self.pp):
            words += ["--microbatch-group-size-per-virtual-pipeline-stage", self.group]
        if self.schedule.startswith("interleaved"):
            words.append("--overlap-p2p-communication-warmup-flush")
        if self.schedule in BREADTH_FIRST:
            words += ["--pipeline-schedule", "breadth-first"]
            words += ["--breadth-first-backward", "late"] if self.schedule == "breadth-first-late" else []
            words += ["--breadth-first-group-size", self.group] if self.group < self.num_microbatches else []
        sharding = _SHARDING_FLAGS[self.sharding] if self.dp > 1 or self.sharding != "replicated" else []
        # Without chunks each rank in turn would gather as its first micro-batch arrives; better all at once before the step.
        words += [word for word in sharding if self.schedule != "1f1b" or word != "--overlap-param-gather"]
        if self.sharding == "zero2":
            words += ["--breadth-first-resident-chunks", self.chunks]
        words += _RECOMPUTE_FLAGS[self.recompute]
        return [str(word) for word in words]


_SHARDING_FLAGS: dict[str, list[str]] = {
    "replicated": ["--overlap-grad-reduce"],
    "zero1": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    "zero2": ["--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist"],
    "zero3": ["--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist"],
}
_RECOMPUTE_FLAGS: dict[str, list[str]] = {
    "none": [],
    "selective": ["--recompute-granularity", "selective"],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
}

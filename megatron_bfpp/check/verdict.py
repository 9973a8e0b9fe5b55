"""The ranks' answers against the placement, the estimate and a GPU's memory: the findings, and all of it as JSON."""

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from ..console.errors import UserError
from ..planner.hardware import GPU
from .answers import Job, Question, Rank
from .placed import Placed, placed


def placed_as_built(question: Question, job: Job, gpu: GPU | None, is_asked: bool) -> tuple[Placed | None, str]:
    """Return the estimate of the job as Megatron has placed it, or None and the reason why there is none.

    Raises UserError where --gpu asked for a prediction (is_asked) that cannot be made.
    """
    try:
        # What Megatron has derived; --padded-vocab-size, if given, goes before the number of words.
        derived = ["--vocab-size", str(job.vocab_size), "--global-batch-size", str(job.global_batch)]
        words = [*question.words, *derived, "--micro-batch-size", str(job.micro_batch)]
        found = placed(words, question.world_size, job.chunks, job.stage_layers, job.resident_chunks)
    except UserError as error:
        if is_asked:
            raise UserError(f"nothing can be predicted for --gpu: {error}") from None
        return None, str(error).splitlines()[0]
    if gpu is not None and not gpu.has(found.precision):
        if found.precision.startswith("fp8"):
            raise UserError(f"{gpu.name} has no fp8.\n  Leave out --fp8-format, or name another --gpu.")
        words = [f"--{each}" for each in gpu.peak_flops if each in ("bf16", "fp16")]
        raise UserError(f"{gpu.name} has no {found.precision}.\n  Use {' or '.join(words)}, or another --gpu.")
    return found, ""


@dataclass(frozen=True)
class Answer:
    """The answers of all ranks, beside the estimate. unknown: the reason why there is no `placed`."""

    ranks: list[Rank]
    question: Question
    gpu: GPU | None
    reserve: float  # bytes
    placed: Placed | None
    unknown: str

    def findings(self) -> list[str]:
        """Return one line for each thing that is wrong with the job."""
        found = [
            f"the {plan.what} plan of {plan.num_microbatches} micro-batches is unsound: {plan.unsound}"
            for plan in self.ranks[0].plans
            if plan.unsound
        ]
        return found + self._layers() + self._parameters() + self._memory()

    def _layers(self) -> list[str]:
        """Compare the layers of each stage with the placement: built elsewhere, not at all, or twice."""
        counts = self.ranks[0].job.stage_layers
        last = list(accumulate(counts))
        expected = [list(range(end - count + 1, end + 1)) for end, count in zip(last, counts, strict=True)]
        return [
            f"stage {chunk.stage} (pp_rank {rank.pp_rank}) was built with layers {sorted(chunk.layers)}, "
            f"and the placement gives it {expected[chunk.stage]}"
            for rank in self.ranks
            for chunk in rank.chunks
            if sorted(chunk.layers) != expected[chunk.stage]
        ]

    def _parameters(self) -> list[str]:
        if self.placed is None:
            return []
        built = [
            (rank.pp_rank, chunk, self.placed.parameters(chunk.stage)) for rank in self.ranks for chunk in rank.chunks
        ]
        return [
            f"stage {chunk.stage} (pp_rank {pp_rank}): Megatron builds {chunk.parameters:,} parameters, "
            f"bfpp plan counts {expected:,} ({chunk.parameters - expected:+,})"
            for pp_rank, chunk, expected in built
            if chunk.parameters != expected
        ]

    def _memory(self) -> list[str]:
        if self.gpu is None or self.placed is None:
            return []
        usable = self.gpu.memory - self.reserve
        needed = [(rank.pp_rank, self.placed.memory(self.gpu, rank.pp_rank).total) for rank in self.ranks]
        worst = max(needed, key=lambda each: each[1])
        if worst[1] <= usable:
            return []
        count = sum(total > usable for _, total in needed)
        needs = f"pp_rank {worst[0]} needs {worst[1] / 1e9:.1f} GB of {usable / 1e9:.1f} GB"
        less = f"{self.gpu.memory / 1e9:g} GB less {self.reserve / 1e9:g} GB for CUDA, NCCL and fragments"
        return [f"{count} of {len(needed)} pipeline ranks do not fit: {needs} ({less})"]

    def as_dict(self) -> dict[str, Any]:
        """Return all that is known, as `--json` writes it: sizes in parameters and bytes, times in seconds."""
        content: dict[str, Any] = {
            "world_size": self.question.world_size,
            "job": asdict(self.ranks[0].job),
            "plans": [asdict(plan) for plan in self.ranks[0].plans],
            "ranks": [self._rank(rank) for rank in self.ranks],
            "not_compared": self.unknown,
            "notes": self.question.notes,
            "capability": self.question.capability,
            "findings": self.findings(),
        }
        if self.placed is not None:
            content |= {"parameters": self.placed.gpt.parameters, "precision": self.placed.precision}
            if self.gpu is not None:
                content["predicted"] = self._predicted(self.placed, self.gpu)
        return content

    def _predicted(self, found: Placed, gpu: GPU) -> dict[str, Any]:
        step, batch, gpus = found.step(gpu), self.ranks[0].job.global_batch, self.question.world_size
        return {
            "gpu": gpu.name,
            "usable_memory": gpu.memory - self.reserve,
            "step_s": step.step,
            "bubble_fraction": step.bubble_fraction,
            "exposed_communication_s": step.exposed_communication,
            "tokens_per_s_per_gpu": batch * found.gpt.seq_length / step.step / gpus,
            "tflops_per_gpu": found.gpt.flops(batch) / step.step / gpus / 1e12,
            "is_bound": not found.is_even,
            "resident_chunks": found.strategy.resident_chunks,
        }

    def _rank(self, rank: Rank) -> dict[str, Any]:
        parameters = sum(chunk.parameters for chunk in rank.chunks)
        content: dict[str, Any] = {
            "pp_rank": rank.pp_rank, "parameters": parameters, "chunks": [asdict(chunk) for chunk in rank.chunks]
        }  # fmt: skip
        if self.placed is not None:
            for chunk in content["chunks"]:
                chunk["planned"] = self.placed.parameters(chunk["stage"])
        if self.gpu is not None and self.placed is not None:
            memory = self.placed.memory(self.gpu, rank.pp_rank)
            content["memory"] = {**asdict(memory), "total": memory.total}
            del content["memory"]["pp_rank"]
        return content

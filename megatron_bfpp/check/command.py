"""bfpp check --config FILE: a job's real configuration tried on a machine without GPUs, before a cluster is allocated.

Megatron, in a process per pipeline rank, validates the command line and builds the rank's chunks; here the answers are compared
with the estimates and told. Neither torch nor Megatron is imported before the command line has been read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..console.config_file import cluster, load
from ..console.errors import UserError
from ..console.files import write_whole
from .plan import check_plan

if TYPE_CHECKING:
    from ..planner.hardware import GPU
    from .answers import Question, Rank
    from .placed import Placed

TOLERANCE = 0.01  # of parameters between Megatron's model and the estimate's
GPUS_PER_NODE = 8  # where no kind of GPU is named
# Major compute capability, which Megatron's validation asks for.
CAPABILITIES = {"v100": 7, "a100": 8, "h100": 9, "h200": 9}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser("check", help="prove a plan free of deadlock; try a job's configuration without a GPU")
    what = "CSV or text of a plan, as `bfpp show --plan` writes it, - for standard input; or -- and Megatron's flags"
    check.add_argument("file", nargs="*", help=what)
    given = "of the shape; default: what the file's stages and micro-batches say"
    check.add_argument("--pp", type=int, help=f"pipeline ranks {given}")
    check.add_argument("--chunks", type=int, help="model chunks per rank")
    check.add_argument("--microbatches", type=int, help="micro-batches")
    job = check.add_argument_group("a job's configuration, tried without a GPU")
    job.add_argument("--config", metavar="YAML", help="a file of configs/; flags after -- replace its own")
    job.add_argument("--gpus", type=int, metavar="N", help="world size; default: WORLD_SIZE, or the file's cluster")
    job.add_argument(
        "--gpu", help="v100-32, h100-80 ... or a YAML profile: predicts time and memory; default as --gpus"
    )
    job.add_argument("--rank", metavar="R,...", help="only these pipeline ranks")
    job.add_argument("--reserve-gb", type=float, default=4.0, help="of a GPU, for CUDA, NCCL and fragments; default 4")
    job.add_argument("--json", metavar="PATH", help="write all that was found")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    files = [word for word in args.file[:1] if not word.startswith("--")]
    if not files and (args.config is not None or args.file):
        return _try_job(args, args.file)
    if len(files) != len(args.file) or not files or args.config is not None:
        raise UserError("one thing is checked at a time.\n"
                        "  Give the FILE of a plan, or --config YAML, or -- and Megatron's flags.")  # fmt: skip
    return check_plan(files[0], args.pp, args.chunks, args.microbatches)


def _try_job(args: argparse.Namespace, flags: list[str]) -> int:
    """flags: Megatron's, which follow those of the configuration."""
    from ..planner.hardware import load_gpu

    started = time.monotonic()
    is_asked = args.gpu is not None
    if args.config is not None and not is_asked:
        args.gpu = cluster(args.config).gpu
    gpu = None if args.gpu is None else load_gpu(args.gpu)
    if gpu is not None and not 0 <= 1e9 * args.reserve_gb < gpu.memory:
        raise UserError(f"--reserve-gb {args.reserve_gb:g} leaves nothing of {gpu.memory / 1e9:g} GB.")
    question, source = _question(args, flags, gpu)
    pp_ranks = _pp_ranks(args.rank, question.words)
    ranks = _examined(question, pp_ranks)
    answer = Answer(ranks, question, gpu, 1e9 * args.reserve_gb, *_placed(question, ranks[0], gpu, is_asked))
    from .table import report

    print(report(answer.as_dict(), source))
    print(f"checked in {time.monotonic() - started:.0f} s")
    if args.json is not None:
        write_whole(args.json, json.dumps(answer.as_dict(), indent=1) + "\n", "--json")
        print(f"wrote {args.json}")
    return 1 if answer.findings() else 0


# What is asked


def _question(args: argparse.Namespace, flags: list[str], gpu: GPU | None) -> tuple[Question, str]:
    """Return what the ranks are asked, and where the world size comes from."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron warns of every library that a CPU does without
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from .answers import Question

    environment, words = ({}, []) if args.config is None else load(args.config, expand=False)
    environment = {name: _expanded(value) for name, value in environment.items()}
    words = [*map(_expanded, words), *flags]
    world_size, source = _world_size(args, environment)
    if not 1 <= world_size <= 10**6:
        raise UserError(f"the number of GPUs is {world_size} ({source}); it must lie between 1 and 1000000.")
    per_node = GPUS_PER_NODE if gpu is None else gpu.gpus_per_node
    kind = "" if args.gpu is None else Path(args.gpu).stem.split("-")[0].lower()
    return Question(words, {**os.environ, **environment}, world_size, per_node, CAPABILITIES.get(kind)), source


def _expanded(text: str) -> str:
    """With ${VAR} as far as it is set: what names a data file need not be there."""
    return re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), text)


def _world_size(args: argparse.Namespace, environment: dict[str, str]) -> tuple[int, str]:
    if args.gpus is not None:
        return args.gpus, "--gpus"
    for variables, source in ((environment, f"WORLD_SIZE of {args.config}"), (os.environ, "WORLD_SIZE")):
        if "WORLD_SIZE" in variables:
            if not variables["WORLD_SIZE"].isdigit():
                raise UserError(f"{source} is {variables['WORLD_SIZE']!r}; it must be a number.")
            return int(variables["WORLD_SIZE"]), source
    if args.config is not None and (gpus := cluster(args.config).gpus) is not None:
        return gpus, f"the cluster of {args.config}"
    raise UserError(
        "the number of GPUs is not known.\n  Add --gpus N, the world size of the job, or `cluster: {gpus: N}` to its file."
    )


def _pp_ranks(text: str | None, words: list[str]) -> list[int]:
    pp_size = _pp_size(words)
    if text is None:
        return list(range(pp_size))
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < pp_size for part in parts):
        raise UserError(
            f"--rank {text}: the pipeline ranks are 0 to {pp_size - 1}.\n  Write it as 0 or 0,{pp_size - 1}."
        )
    return sorted(set(map(int, parts)))


def _pp_size(words: list[str]) -> int:
    """1 where the flag is not there, or is what Megatron will refuse."""
    flag, found = "--pipeline-model-parallel-size", "1"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return int(found) if found.isascii() and found.isdigit() and 0 < int(found) <= 10**4 else 1


def _examined(question: Question, pp_ranks: list[int]) -> list[Rank]:
    from .processes import examine_ranks

    bar = _Progress(len(pp_ranks))
    try:
        return examine_ranks(question, pp_ranks, bar.step)
    finally:
        bar.end()


# What is answered


def _placed(question: Question, rank: Rank, gpu: GPU | None, is_asked: bool) -> tuple[Placed | None, str]:
    """The estimate's model, or why there is none. UserError where --gpu asked for a prediction that cannot be made."""
    from .placed import placed

    job = rank.job
    try:
        found = placed(question.words, question.world_size, job.chunks, job.stage_layers, job.resident_chunks)
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
    """unknown: why there is no `placed`."""

    ranks: list[Rank]
    question: Question
    gpu: GPU | None
    reserve: float  # bytes
    placed: Placed | None
    unknown: str

    def findings(self) -> list[str]:
        """What is wrong with the job."""
        found = [
            f"the {plan.what} plan of {plan.num_microbatches} micro-batches is unsound: {plan.unsound}"
            for plan in self.ranks[0].plans
            if plan.unsound
        ]
        return found + self._layers() + self._parameters() + self._memory()

    def _layers(self) -> list[str]:
        """Layers that Megatron has built elsewhere than its placement says, not at all, or twice."""
        expected, before = {}, 0
        for stage, count in enumerate(self.ranks[0].job.stage_layers):
            expected[stage] = list(range(before + 1, before + count + 1))
            before += count
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
        found = []
        for rank in self.ranks:
            for chunk in rank.chunks:
                expected = self.placed.parameters(chunk.stage)
                if abs(chunk.parameters - expected) > TOLERANCE * expected:
                    found.append(
                        f"stage {chunk.stage} (pp_rank {rank.pp_rank}): Megatron builds {chunk.parameters:,} parameters, "
                        f"the estimate has {expected:,} ({chunk.parameters / expected - 1:+.1%})"
                    )
        return found

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
        """Sizes in parameters and bytes, times in seconds."""
        content: dict[str, Any] = {
            "world_size": self.question.world_size,
            "job": asdict(self.ranks[0].job),
            "plans": [asdict(plan) for plan in self.ranks[0].plans],
            "ranks": [self._rank(rank) for rank in self.ranks],
            "not_compared": self.unknown,
            "capability": self.question.capability,
            "findings": self.findings(),
        }
        if self.placed is not None:
            content |= {"parameters": self.placed.gpt.parameters, "precision": self.placed.precision}
        if self.gpu is not None and self.placed is not None:
            step = self.placed.step(self.gpu)
            batch, gpus = content["job"]["global_batch"], self.question.world_size
            content["predicted"] = {
                "gpu": self.gpu.name,
                "usable_memory": self.gpu.memory - self.reserve,
                "step_s": step.step,
                "bubble_fraction": step.bubble_fraction,
                "exposed_communication_s": step.exposed_communication,
                "tokens_per_s_per_gpu": batch * self.placed.gpt.seq_length / step.step / gpus,
                "tflops_per_gpu": self.placed.gpt.flops(batch) / step.step / gpus / 1e12,
                "is_bound": not self.placed.is_even,
                "resident_chunks": self.placed.strategy.resident_chunks,
            }
        return content

    def _rank(self, rank: Rank) -> dict[str, Any]:
        content: dict[str, Any] = {
            "pp_rank": rank.pp_rank,
            "parameters": sum(chunk.parameters for chunk in rank.chunks),
        }
        content["chunks"] = [asdict(chunk) for chunk in rank.chunks]
        if self.gpu is not None and self.placed is not None:
            memory = self.placed.memory(self.gpu, rank.pp_rank)
            content["memory"] = {**asdict(memory), "total": memory.total}
            del content["memory"]["pp_rank"]
        return content


class _Progress:
    """A bar on a terminal, on standard error: the table can be piped."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.monotonic()
        self._show("starting Megatron")

    def step(self, pp_rank: int) -> None:
        self.done += 1
        left_s = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        self._show(f"pp_rank {pp_rank} is built, about {left_s:.0f} s left")

    def _show(self, what: str) -> None:
        progress.show(self.done / self.total, what)

    def end(self) -> None:
        progress.clear()

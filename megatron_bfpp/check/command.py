"""bfpp check: a plan proved sound; or, with --config, a job's real configuration tried before a cluster is allocated.

Megatron, in a process per pipeline rank, validates the command line and builds the rank's chunks; the answers are
compared here with the estimates. Neither torch nor Megatron is imported in this process.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..console.config_file import cluster, load
from ..console.errors import UserError, require
from ..console.files import write_wanted
from ..console.forked import Forks
from ..console.numbers import at_least, between
from ..console.progress import Steps
from ..schedule import ScheduleError, check, formats, simulate
from ..schedule.ir import BACKWARDS
from .answers import Question, Rank

if TYPE_CHECKING:
    from ..planner.hardware import GPU

_PRELOAD = ("megatron.training.training", "megatron_bfpp.integration.step.forward_backward",
            "megatron_bfpp.integration.gpt.script", "megatron_bfpp.check.rank")  # fmt: skip
MOST_GPUS = 10**6
GPUS_PER_NODE = 8  # where no kind of GPU is named
# Major compute capability, which Megatron's validation asks for.
CAPABILITIES = {"v100": 7, "a100": 8, "h100": 9, "h200": 9}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `check` to the commands of bfpp."""
    parser = commands.add_parser("check", help="prove a plan free of deadlock; try a job's configuration without a GPU")
    what = "CSV or text of a plan, as `bfpp show --plan` writes it, - for standard input; or -- and Megatron's flags"
    parser.add_argument("file", nargs="*", help=what)
    given = "of the shape; default: what the file's stages and micro-batches say"
    parser.add_argument("--pp", type=at_least(2), help=f"pipeline ranks {given}")
    parser.add_argument("--chunks", type=at_least(1), help="model chunks per rank")
    parser.add_argument("--microbatches", type=at_least(1), help="micro-batches")
    job = parser.add_argument_group("a job's configuration, tried without a GPU")
    job.add_argument("--config", metavar="YAML", help="a file of configs/; flags after -- replace its own")
    gpus = at_least(1, MOST_GPUS)
    job.add_argument("--gpus", type=gpus, metavar="N", help="world size; default: WORLD_SIZE, or the file's cluster")
    job.add_argument(
        "--gpu", help="v100-32, h100-80 ... or a YAML profile: predicts time and memory; default as --gpus"
    )
    job.add_argument("--rank", metavar="R,...", help="only these pipeline ranks")
    reserved = between(0, 10_000)
    job.add_argument(
        "--reserve-gb", type=reserved, default=4.0, help="of a GPU, for CUDA, NCCL and fragments; default 4"
    )
    job.add_argument("--json", metavar="PATH", help="write all that was found")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what is named: the file of a plan, or a job."""
    files = [word for word in args.file[:1] if not word.startswith("--")]
    if not files and (args.config is not None or args.file):
        return _try_job(args, args.file)
    if len(files) != len(args.file) or not files or args.config is not None:
        raise UserError("one thing is checked at a time.\n"
                        "  Give the FILE of a plan, or --config YAML, or -- and Megatron's flags.")  # fmt: skip
    return _check_plan(files[0], args.pp, args.chunks, args.microbatches)


def _check_plan(path: str, pp: int | None, chunks: int | None, microbatches: int | None) -> int:
    """Print whether the plan is sound and return 0 if it is, else 1. None: the shape that the file's numbers give."""
    plan = formats.read(path)
    shape = formats.shape_of(plan, pp, chunks, microbatches, path)
    try:
        check(plan, shape, forward_only=not any(action.op in BACKWARDS for rank in plan for action in rank))
    except ScheduleError as error:
        print(f"unsound as {formats.title(shape)}: {error}")
        return 1
    most = max(simulate(plan, shape).peak_owed_weight_gradients())
    owed = f"; weights' gradients of up to {most} micro-batches wait on a rank" if most else ""
    print(f"sound: {formats.title(shape)}, {sum(map(len, plan))} actions, plan {formats.digest(plan)}{owed}")
    return 0


def _try_job(args: argparse.Namespace, flags: list[str]) -> int:
    """Try a job. flags: Megatron's, which follow those of the configuration."""
    from ..planner.hardware import load_gpu
    from .table import report
    from .verdict import Answer, placed_as_built

    started = time.monotonic()
    is_asked = args.gpu is not None
    if args.config is not None and not is_asked:
        args.gpu = cluster(args.config).gpu
    gpu = None if args.gpu is None else load_gpu(args.gpu)
    if gpu is not None and 1e9 * args.reserve_gb >= gpu.memory:
        raise UserError(f"--reserve-gb {args.reserve_gb:g} leaves nothing of {gpu.memory / 1e9:g} GB.")
    question, source = _question(args, flags, gpu)
    pp_ranks = _pp_ranks(args.rank, question.words)
    ranks = examine_ranks(question, pp_ranks)
    estimate = placed_as_built(question, ranks[0].job, gpu, is_asked)
    answer = Answer(ranks, question, gpu, 1e9 * args.reserve_gb, *estimate)
    print(report(answer.as_dict(), source))
    print(f"checked in {time.monotonic() - started:.0f} s")
    write_wanted(args, json=answer.as_dict)
    return 1 if answer.findings() else 0


def examine_ranks(question: Question, pp_ranks: list[int]) -> list[Rank]:
    """Return the answers in the order of `pp_ranks`, the first with the plans; as many ranks at a time as cores.

    Raises UserError with the message of the first rank that is refused, or where one is killed.
    """
    require("megatron", "a job's configuration")
    found: dict[int, Rank] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with Forks(*_PRELOAD, at_most=cores) as forks, Steps(len(pp_ranks), "starting Megatron") as bar:
        for pp_rank in pp_ranks:
            forks.start(f"pp_rank {pp_rank}", _rank, question, pp_rank, pp_rank == pp_ranks[0])
        while (answer := forks.next()) is not None:
            rank: Rank = answer[1]
            found[rank.pp_rank] = rank
            bar.step(f"pp_rank {rank.pp_rank} is built")
    return [found[pp_rank] for pp_rank in pp_ranks]


def _rank(question: Question, pp_rank: int, with_plans: bool) -> Iterator[Rank]:
    from .rank import examine

    with tempfile.TemporaryFile() as log:  # Megatron lists its arguments and its groups; only the answer counts
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield examine(question, pp_rank, with_plans)


def _question(args: argparse.Namespace, flags: list[str], gpu: "GPU | None") -> tuple[Question, str]:
    """Return what the ranks are asked, and where the world size comes from."""
    environment, words = ({}, []) if args.config is None else load(args.config, expand=False)
    environment = {name: _expanded(value) for name, value in environment.items()}
    words = [*map(_expanded, words), *flags]
    world_size, source = _world_size(args, environment)
    if not 1 <= world_size <= MOST_GPUS:
        raise UserError(f"the number of GPUs is {world_size} ({source}); it must lie between 1 and {MOST_GPUS}.")
    per_node = GPUS_PER_NODE if gpu is None else gpu.gpus_per_node
    kind = "" if args.gpu is None else Path(args.gpu).stem.split("-")[0].lower()
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return Question(words, environment, world_size, per_node, CAPABILITIES.get(kind)), source


def _expanded(text: str) -> str:
    """Replace ${VAR} as far as it is set: the variables that name data files need not be."""
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
        "the number of GPUs is not known.\n"
        "  Add --gpus N, the world size of the job, or `cluster: {gpus: N}` to its file."
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
    """Read the last --pipeline-model-parallel-size; 1 without the flag, or where Megatron will refuse its value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pipeline-model-parallel-size", dest="pp", nargs="?", default="1")
    found = parser.parse_known_args(words)[0].pp or ""
    return int(found) if found.isascii() and found.isdigit() and 0 < int(found) <= 10**4 else 1

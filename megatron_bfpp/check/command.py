"""bfpp check: a plan proved sound; or a job's real configuration, of a file, tried before a cluster is allocated.

Megatron, in a process per pipeline rank, validates the command line and builds the rank's chunks; the answers are
compared here with the estimates. Neither torch nor Megatron is imported in this process.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator

from ..console.config_file import cluster
from ..console.errors import UserError, require
from ..console.files import check_wanted, write_wanted
from ..console.forked import Forks
from ..console.numbers import at_least, between
from ..console.progress import Steps
from ..schedule import ScheduleError, check, formats, simulate
from ..schedule.ir import BACKWARDS
from .answers import Question, Rank

_PRELOAD = ("megatron.training.training", "megatron_bfpp.integration.step.forward_backward",
            "megatron_bfpp.integration.gpt.script", "megatron_bfpp.check.rank")  # fmt: skip
_JOBS = (".yaml", ".yml", ".sh", ".sbatch", ".slurm")  # files of a job; any other is a plan's


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `check` to the commands of bfpp."""
    parser = commands.add_parser("check", help="prove a plan free of deadlock; try a job's configuration without a GPU")
    what = (
        "CSV or text of a plan, as `bfpp show --plan` writes it, - for standard input; a job's file: of configs/, of"
        " Megatron's tests (.yaml), or a script (.sh, .sbatch, .slurm); and -- and Megatron's flags"
    )
    parser.add_argument("file", nargs="*", help=what)
    given = "of the shape; default: what the file's stages and micro-batches say"
    parser.add_argument("--pp", type=at_least(2), help=f"pipeline ranks {given}")
    parser.add_argument("--chunks", type=at_least(1), help="model chunks per rank")
    parser.add_argument("--microbatches", type=at_least(1), help="micro-batches")
    job = parser.add_argument_group("a job's configuration, tried without a GPU")
    job.add_argument("--config", metavar="FILE", help="the job's file; flags after -- replace its own")
    gpus = at_least(1, 10**6)
    job.add_argument("--gpus", type=gpus, metavar="N", help="world size; default: WORLD_SIZE, or the file's cluster")
    job.add_argument(
        "--gpu", help="v100-32, h100-80 ... or a YAML profile: predicts time and memory; default as --gpus"
    )
    job.add_argument(
        "--fit-batch", action="store_true", help="raise the file's --global-batch-size to what the GPUs need"
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
    if args.file and args.file[0].endswith(_JOBS) and args.config is None:
        args.config, *args.file = args.file
    is_named = bool(args.file) and not args.file[0].startswith("--")
    if not is_named and (args.config is not None or args.file):
        return _try_job(args, args.file)
    if len(args.file) != 1 or args.config is not None:
        wrong = "nothing to check is named" if not args.file else "one thing is checked at a time"
        raise UserError(f"{wrong}.\n"
                        "  Give the FILE of a plan or of a job, or -- and Megatron's flags.")  # fmt: skip
    names = {"gpus": "--gpus", "gpu": "--gpu", "fit_batch": "--fit-batch", "rank": "--rank", "json": "--json"}
    given = [flag for name, flag in names.items() if getattr(args, name)]
    if given:
        raise UserError(f"{', '.join(given)} has no meaning for the plan in {args.file[0]}.\n"
                        f"  Leave it out, or name a job: a file that ends with {', '.join(_JOBS)}.")  # fmt: skip
    return _check_plan(args.file[0], args.pp, args.chunks, args.microbatches)


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
    from .job import fitting_batch, pp_ranks_of, question_of
    from .table import report
    from .verdict import Answer, placed_as_built

    started = time.monotonic()
    check_wanted(args, "json")
    is_asked = args.gpu is not None
    if args.config is not None and not is_asked and args.config.endswith((".yaml", ".yml")):
        args.gpu = cluster(args.config).gpu
    gpu = None if args.gpu is None else load_gpu(args.gpu)
    if gpu is not None and 1e9 * args.reserve_gb >= gpu.memory:
        raise UserError(f"--reserve-gb {args.reserve_gb:g} leaves nothing of {gpu.memory / 1e9:g} GB.")
    question, source = question_of(args, flags, gpu)
    pp_ranks = pp_ranks_of(args.rank, question.words)
    try:
        ranks = examine_ranks(question, pp_ranks)
    except UserError as error:
        is_of_batch = args.config is not None and "batch" in str(error)
        fitting = None if not is_of_batch else fitting_batch(question.words, flags, question.world_size)
        more = "" if fitting is None else f"\n  --fit-batch makes the batch of these GPUs {fitting[0]}."
        raise UserError(f"{error}{more}") from None
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

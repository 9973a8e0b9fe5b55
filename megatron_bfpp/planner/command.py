"""bfpp plan: which way to divide a model over GPUs, what it needs and takes, before a job. Neither torch nor Megatron."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..console import progress
from ..console.config_file import Cluster, cluster, load
from ..console.errors import UserError, require
from ..console.files import write_whole
from ..console.numbers import at_least, between, positive

if TYPE_CHECKING:
    from .search import Found, Request

SHORTEST_UPDATE_S = 0.1  # of the progress bar

_CHOICES = {  # Request's field: of which words
    "schedule": ("no-pipeline", "1f1b", "interleaved", "interleaved-grouped", "breadth-first", "breadth-first-late"),
    "sharding": ("replicated", "zero1", "zero2", "zero3"),
    "recompute": ("none", "selective", "full"),
}
_NUMBERS = {
    "pp": "pipeline ranks",
    "tp": "tensor-parallel ranks",
    "chunks": "model chunks per pipeline rank",
    "micro_batch": "sequences of a micro-batch",
    "group": "micro-batches that run through a chunk before the next",
}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="which way to divide a model over GPUs: predicted time and memory")
    plan.add_argument("model", nargs="+", help="a file of configs/, or -- and Megatron's flags")
    plan.add_argument("--gpus", type=at_least(1), help="how many; default: the model file's cluster")
    plan.add_argument("--gpu", help="v100-32, a100-80, h100-80, h200, or a YAML profile's path; default as --gpus")
    plan.add_argument(
        "--global-batch",
        metavar="N,...",
        help="sequences of a step; 64,128 or 64-512 (doubling) compares. Default: the model file's",
    )
    for name, meaning in _NUMBERS.items():
        plan.add_argument(f"--{name.replace('_', '-')}", metavar="N,...", help=f"only these numbers of {meaning}")
    for name, words in _CHOICES.items():
        plan.add_argument(f"--{name}", metavar="NAME,...", help=f"only these of {', '.join(words)}")
    plan.add_argument("--precision", choices=("fp32", "fp16", "bf16", "fp8", "fp8-params"),
                      help="default: the flags', else the GPU's own; fp8: --fp8-format, fp8-params: with --fp8-param-gather")  # fmt: skip
    plan.add_argument("--no-sequence-parallel", action="store_true", help="tensor parallelism without it")
    waits = "Megatron's schedules wait for all messages and reductions, as before 2023"
    plan.add_argument("--no-overlap", action="store_true", help=waits)
    plan.add_argument(
        "--reserve-gb",
        type=between(0, 10**6),
        default=4.0,
        help="memory of a GPU for CUDA, NCCL and fragments; default 4",
    )
    plan.add_argument(
        "--hypothetical",
        action="store_true",
        help="also what Megatron refuses today: FSDP2 with fp16 or tied embeddings",
    )
    plan.add_argument(
        "--as-configured", action="store_true", help="no search: the strategy that the model's flags name"
    )
    plan.add_argument(
        "--calibrate", type=positive, metavar="SECONDS", help="a measured step of the strategy that the flags name"
    )
    plan.add_argument("--measured-gpus", type=at_least(1), metavar="N", help="on how many GPUs; default --gpus")
    plan.add_argument("--top", type=at_least(1), default=10, help="how many to show; default 10")
    plan.add_argument("--rejected", action="store_true", help="say why strategies were rejected")
    plan.add_argument("--json", metavar="PATH", help="write the fastest, with their memory and flags")
    plan.add_argument(
        "--plot", metavar="PATH", help="write a picture: PNG, SVG or PDF by its ending; needs several batches"
    )
    plan.add_argument(
        "--critical-batch-size", type=between(1, 10**9), metavar="N", help="in sequences; draws cost against time too"
    )
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .search import search
    from .table import as_json

    request, batches, flags = _request(args)
    found: dict[int, Found] = {}
    bar = _Progress(len(batches))
    for batch in batches:
        request = replace(request, global_batch=batch)
        if args.as_configured:
            found[batch] = _configured(request, flags)
        else:
            found[batch] = search(request, bar.step)
        bar.next()
    bar.end()
    if not any(each.estimates for each in found.values()):
        if args.rejected:
            print(_rejections(found))
        raise UserError(_fits_nowhere(request, found))
    _print(args, request, found)
    if args.json is not None:
        content = {
            "gpu": request.gpu.name,
            "gpus": request.num_gpus,
            "precision": request.precision,
            "parameters": request.gpt.parameters,
            "matmul": request.gpu.matmul,
            "batches": [as_json(each, replace(request, global_batch=batch), args.top) for batch, each in found.items()],
        }
        write_whole(args.json, json.dumps(content, indent=1) + "\n", "--json")
        print(f"wrote {args.json}")
    if args.plot is not None:
        from .plot import plot

        plot(found, request, args.plot, args.critical_batch_size, _title(request))
        print(f"wrote {args.plot}")
    return 0


# What is asked for


def _request(args: argparse.Namespace) -> tuple[Request, list[int], argparse.Namespace]:
    """The request, the global batches, and the model's flags."""
    from .flags import batch_list, gpt_of, name_list, number_list, parse, precision_of, strategy_of
    from .hardware import load_gpu
    from .search import Request, estimate

    flags = parse(model_words(args.model))
    _complete_cluster(args)
    gpt, gpu = gpt_of(flags), load_gpu(args.gpu)
    precision = args.precision or precision_of(flags) or gpu.precision
    if not gpu.has(precision):
        raise UserError(
            f"{gpu.name} has no {precision.removesuffix('-params')}.\n  Use --precision {' or '.join(gpu.peak_flops)}."
        )
    if not 0 <= 1e9 * args.reserve_gb < gpu.memory:
        raise UserError(f"--reserve-gb {args.reserve_gb:g} leaves nothing of {gpu.memory / 1e9:g} GB.")
    batches = batch_list(args.global_batch, flags.global_batch_size)
    if args.as_configured and len(batches) > 1:
        raise UserError(
            "--as-configured is one strategy, of one global batch.\n  Leave out --global-batch, or --as-configured."
        )
    if args.plot is not None:
        require("matplotlib", "--plot")
        if len(batches) < 2:
            raise UserError("--plot draws time against batch size.\n  Give several batches: --global-batch 64-512.")
    numbers = {name: number_list(f"--{name.replace('_', '-')}", getattr(args, name)) for name in _NUMBERS}
    names = {name: name_list(f"--{name}", getattr(args, name), words) for name, words in _CHOICES.items()}
    request = Request(
        gpt, gpu, args.gpus, batches[0], precision, 1e9 * args.reserve_gb, args.hypothetical, not args.no_sequence_parallel,
        not args.no_overlap, names["schedule"], numbers["pp"], numbers["tp"], numbers["chunks"], numbers["micro_batch"], numbers["group"],
        names["sharding"], names["recompute"],
    )  # fmt: skip
    if args.calibrate is not None:
        strategy = strategy_of(flags, args.measured_gpus or args.gpus)
        measured = gpu.calibrated(
            args.calibrate, lambda gpu: estimate(replace(request, gpu=gpu), strategy, True).step.step
        )
        print(
            f"calibrated: large matrix products achieve {measured.matmul:.1%} of the peak ({gpu.matmul:.0%} in the profile)"
        )
        request = replace(request, gpu=measured)
    return request, batches, flags


def model_words(model: list[str]) -> list[str]:
    """Megatron's flags, from a file or as they are."""
    if model[0].startswith("--"):
        return model
    if len(model) > 1:
        raise UserError(
            f"{shlex.join(model)} is more than one file.\n  Give one file of configs/, or -- and Megatron's flags."
        )
    return load(model[0], expand=False)[1]


def _complete_cluster(args: argparse.Namespace) -> None:
    """Take --gpu and --gpus from the model file's cluster where they are not given."""
    named = Cluster() if args.model[0].startswith("--") else cluster(args.model[0])
    args.gpu = named.gpu if args.gpu is None else args.gpu
    args.gpus = named.gpus if args.gpus is None else args.gpus
    missing = [flag for flag in ("--gpu", "--gpus") if getattr(args, flag[2:]) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given.\n"
                        "  Add --gpu KIND and --gpus N, or `cluster: {gpu: KIND, gpus: N}` to the model's file.")  # fmt: skip


def _configured(request: Request, flags: argparse.Namespace) -> Found:
    """The one strategy that the flags name; none where it does not fit."""
    from collections import Counter

    from .flags import strategy_of
    from .search import Found, estimate

    flags.global_batch_size = request.global_batch
    found = estimate(request, strategy_of(flags, request.num_gpus), exact=True)
    if found.memory.total > request.gpu.memory - request.reserve:
        return Found([], Counter({"memory: more than a GPU has": 1}), 1, found.memory)
    return Found([found], Counter(), 1, None)


# What is answered


def _title(request: Request) -> str:
    return f"GPT of {request.gpt.parameters / 1e9:.1f}B parameters, {request.num_gpus} x {request.gpu.name}, {request.precision}"


def _print(args: argparse.Namespace, request: Request, found: dict[int, Found]) -> None:
    from .table import batches, best_of_schedules, ranking, rejections

    print(_title(request))
    for batch, each in found.items():
        print(f"\nglobal batch {batch}: {rejections(each, args.rejected)}")
        if not each.estimates:
            continue
        if len(found) == 1 and not args.as_configured:
            # The late backward takes as long as the eager one and more memory: it would fill every second line.
            is_shown = {"breadth-first-late"} & set(request.schedule)
            shown = [one for one in each.estimates if is_shown or one.strategy.schedule != "breadth-first-late"]
            print(f"\nthe fastest:\n{ranking(shown[: args.top])}\n\nthe fastest of each schedule:")
        print(ranking(best_of_schedules(each)))
        print("\nflags of the fastest:\n  " + shlex.join(each.estimates[0].strategy.flags()))
    if len(found) > 1:
        print("\n" + batches(found, request))
    print(
        "\nPredictions, not measurements: docs/guide/planning.md says what they assume. ~ is from a formula, the rest from the plan."
    )


def _rejections(found: dict[int, Found]) -> str:
    from .table import rejections

    return "\n".join(f"global batch {batch}: {rejections(each, True)}" for batch, each in found.items())


def _fits_nowhere(request: Request, found: dict[int, Found]) -> str:
    usable = (request.gpu.memory - request.reserve) / 1e9
    least = min((each.smallest.total for each in found.values() if each.smallest), default=None)
    considered = sum(each.considered for each in found.values())
    if least is None:
        reasons: dict[str, int] = {}
        for each in found.values():
            for reason, count in each.rejected.items():
                reasons[reason] = reasons.get(reason, 0) + count
        why = max(reasons, key=lambda reason: reasons[reason]) if reasons else "nothing to consider"
        return f"none of {considered} strategies for {request.num_gpus} GPUs is possible, most often: {why}.\n  --rejected lists all."
    return (
        f"the model fits nowhere: {request.num_gpus} GPUs with {usable:.1f} GB to use, and at least {least / 1e9:.1f} GB needed"
        f" on one ({considered} strategies).\n  Use more GPUs or larger ones, or lift a restriction; --rejected says why."
    )


class _Progress:
    """A bar on a terminal, on standard error: the table can be piped."""

    def __init__(self, searches: int):
        self.searches, self.finished, self.shown_at = searches, 0, 0.0

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self.shown_at > SHORTEST_UPDATE_S:
            self.shown_at = now
            part = (self.finished + done / max(1, total)) / self.searches
            progress.show(part, f"{part:.0%} of the strategies")

    def next(self) -> None:
        self.finished += 1

    def end(self) -> None:
        progress.clear()

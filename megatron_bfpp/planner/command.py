"""bfpp plan: the ways to divide a model over GPUs, with predicted time and memory. Neither torch nor Megatron."""

import argparse
import shlex
from collections import Counter
from dataclasses import replace
from functools import partial

from ..console import progress
from ..console.config_file import Cluster, cluster, later_runs, load
from ..console.errors import UserError, require
from ..console.files import check_figure, check_wanted, write_wanted
from ..console.numbers import at_least, between, positive
from . import lists, table
from .flags import gpt_of, parse, precision_of, strategy_of
from .flags.script import SCRIPTS, words_of_script
from .flags.strategy import fixed_of, rounded_batch
from .hardware import GPU, known_gpus, load_gpu
from .rows import compare, fitted, read_rows, summary
from .rows import table as table_of_rows
from .search import TOO_LARGE, Found, Request, estimate, search
from .strategy import BLACKWELL, RECOMPUTES, SCHEDULES, SHARDINGS

_CHOICES = {"schedule": SCHEDULES, "sharding": SHARDINGS, "recompute": RECOMPUTES}  # field of a Request: its words
_NUMBERS = {
    "pp": "pipeline ranks",
    "tp": "tensor-parallel ranks",
    "cp": "context-parallel ranks",
    "ep": "expert-parallel ranks",
    "etp": "ranks that share an expert",
    "chunks": "model chunks per pipeline rank",
    "micro_batch": "sequences of a micro-batch",
    "group": "micro-batches that run through a chunk before the next",
}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp plan`."""
    plan = commands.add_parser("plan", help="the ways to divide a model over GPUs: predicted time and memory")
    add = plan.add_argument
    add("model", nargs="*", help="a file of configs/ or of Megatron's tests, or a shell script with Megatron's flags"
        " (.sh, .sbatch, .slurm); and -- and Megatron's flags, which replace its own")  # fmt: skip
    add("--gpus", type=at_least(1), metavar="N", help="how many; default: the model file's cluster")
    add("--gpu", help=f"{', '.join(known_gpus())}, or a YAML profile's path; default as --gpus")
    add("--global-batch", type=lists.doubling, metavar="N,...",
        help="sequences of a step; 64,128 or 64-512 (doubling) compares. Default: the model file's")  # fmt: skip
    for name, meaning in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=lists.numbers, default=(), metavar="N,...", help=f"only these numbers of {meaning}")
    for name, words in _CHOICES.items():
        types = lists.one_of(words)
        add(f"--{name}", type=types, default=(), metavar="NAME,...", help=f"only these of {', '.join(words)}")
    add("--precision", choices=("fp32", "fp16", "bf16", "fp8", "fp8-params"),
        help="default: the flags', else the GPU's own; fp8-params is fp8 with --fp8-param-gather")  # fmt: skip
    add("--no-sequence-parallel", action="store_true", help="tensor parallelism without it")
    add("--no-overlap", action="store_true",
        help="Megatron's schedules wait for all messages and reductions, as before 2023")  # fmt: skip
    add("--connections", type=int, choices=(1, 32), help="hardware queues of a GPU (CUDA_DEVICE_MAX_CONNECTIONS): 1, or"
        " 32: one for each stream; default: 1 with TP before Blackwell, which Megatron demands, else 32")  # fmt: skip
    add("--breadth-first-hop", type=between(0, 100), metavar="C", help="the plugin's flag: for which latency it places"
        " receives, in forwards; default: the model's flags'")  # fmt: skip
    add("--reserve-gb", type=between(0, 10**6), default=4.0, metavar="GB",
        help="memory of a GPU for CUDA, NCCL and fragments; default 4")  # fmt: skip
    add("--hypothetical", action="store_true", help="also FSDP2 with fp16 or tied embeddings, which Megatron refuses")
    add("--as-configured", action="store_true", help="no search: the strategy that the model's flags name")
    add("--calibrate", type=positive, metavar="SECONDS", help="a measured step of the strategy that the flags name")
    add("--measured-gpus", type=at_least(1), metavar="N", help="the GPUs that took it; default --gpus")
    add("--rows", action="store_true", help="MODEL is a file of measured steps: print the estimate beside each")
    add("--fit", action="store_true", help="with --rows: what of a GPU's peak half of them achieve, for a profile")
    add("--top", type=at_least(1), default=10, metavar="N", help="how many to show; default 10")
    add("--rejected", action="store_true", help="print why strategies were rejected")
    add("--json", metavar="PATH", help="write the fastest, with their memory and flags")
    add("--plot", metavar="PATH", help="write a picture: PNG, SVG or PDF by its ending; needs several batches")
    add("--critical-batch-size", type=between(1, 10**9), metavar="N", help="in sequences; draws cost against time too")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print the tables and write the files. Raises UserError where nothing fits."""
    if not args.model:
        raise UserError("no model is given.\n  Give a file of configs/, or -- and Megatron's flags.")
    if args.fit and not args.rows:
        raise UserError("--fit is for measured steps.\n  Add --rows, and give a file of them.")
    if args.rows:
        return _rows(args.model[0], args.fit)
    check_wanted(args, "json", "plot")
    request, batches, flags = _request(args)
    found: dict[int, Found] = {}
    for place, batch in enumerate(batches):
        request = replace(request, global_batch=batch)
        if args.as_configured:
            found[batch] = _configured(request, flags)
        else:
            found[batch] = search(request, partial(_show, place, len(batches)))
    progress.clear()
    if not any(each.estimates for each in found.values()):
        if args.rejected:
            for batch, each in found.items():
                print(f"global batch {batch}: {table.rejections(each, True)}")
        raise UserError(_fits_nowhere(request, found, args.as_configured))
    _print(args, request, found, flags.notes)
    write_wanted(args, json=lambda: _as_json(request, found, args.top, flags.notes))
    if args.plot is not None:
        from .plot import plot

        plot(found, request, args.plot, args.critical_batch_size, _title(request))
    return 0


def _rows(path: str, with_fit: bool) -> int:
    rows = read_rows(path)
    compared = compare(rows)
    print(f"{summary(compared)}\n\n{table_of_rows(compared)}")
    if with_fit:
        print("\n" + fitted(rows))
    return 0


def _show(before: int, searches: int, part: float) -> None:
    part = (before + part) / searches
    progress.show(part, f"{part:.0%} of the search")


# The question


def _request(args: argparse.Namespace) -> tuple[Request, list[int], argparse.Namespace]:
    """Return the request, the global batches, and the model's parsed flags."""
    flags = parse(model_words(args.model))
    flags.notes += notes_of_file(args.model[0])
    if args.breadth_first_hop is not None:
        flags.breadth_first_hop = args.breadth_first_hop
    # A file's batch is for the file's GPUs; for another number of them it is made to fit. What is given must.
    is_of_file = args.gpus is not None and not args.model[0].startswith("--")
    _complete_cluster(args)
    gpt, gpu = gpt_of(flags), load_gpu(args.gpu)
    precision = args.precision or precision_of(flags) or gpu.precision
    if not gpu.has(precision):
        use = " or ".join(gpu.peak_flops)
        raise UserError(f"{gpu.name} has no {precision.removesuffix('-params')}.\n  Use --precision {use}.")
    if flags.fp8_recipe == "mxfp8" and precision.startswith("fp8") and gpu.compute_capability < BLACKWELL:
        raise UserError(f"--fp8-recipe mxfp8 needs compute capability {BLACKWELL}, and {gpu.name} has"
                        f" {gpu.compute_capability:g}.\n  Use tensorwise or blockwise, or another --gpu.")  # fmt: skip
    if 1e9 * args.reserve_gb >= gpu.memory:
        raise UserError(f"--reserve-gb {args.reserve_gb:g} leaves nothing of {gpu.memory / 1e9:g} GB.")
    if args.as_configured and args.global_batch is None and (is_of_file or flags.global_batch_size is None):
        flags.global_batch_size = rounded_batch(flags, args.gpus)
    if args.global_batch is None and flags.global_batch_size is None:
        raise UserError("no global batch is given.\n  Add --global-batch, or --global-batch-size to the model's flags.")
    batches = [flags.global_batch_size] if args.global_batch is None else list(args.global_batch)
    if args.as_configured and len(batches) > 1:
        raise UserError("--as-configured is one strategy, of one global batch.\n"
                        "  Leave out --global-batch, or --as-configured.")  # fmt: skip
    if args.plot is not None:
        require("matplotlib", "--plot")
        check_figure(args.plot, "--plot")
        if len(batches) < 2:
            raise UserError("--plot draws time against batch size.\n  Give several batches: --global-batch 64-512.")
    choices = {name: getattr(args, name) for name in (*_NUMBERS, *_CHOICES)}
    request = Request(
        gpt, gpu, args.gpus, batches[0], precision, 1e9 * args.reserve_gb, args.hypothetical,
        not args.no_sequence_parallel, not args.no_overlap, args.connections, flags.breadth_first_hop,
        fixed_of(flags), **choices,
    )  # fmt: skip
    if args.calibrate is not None:
        request = replace(request, gpu=_calibrated(request, args, flags))
    return request, batches, flags


def model_words(model: list[str]) -> list[str]:
    """Return Megatron's flags: as they are; or from a file, with those that follow it in place of the file's."""
    if model[0].startswith("--"):
        return model
    if len(model) > 1 and not model[1].startswith("--"):
        raise UserError(f"{shlex.join(model)} is more than one file.\n"
                        "  Give one file of configs/, or -- and Megatron's flags.")  # fmt: skip
    words = words_of_script(model[0]) if model[0].endswith(SCRIPTS) else load(model[0], expand=False)[1]
    return [*words, *model[1:]]


def notes_of_file(name: str) -> list[str]:
    """Return a line about the runs of a file that are passed over."""
    runs = later_runs(name) if not name.startswith("--") and not name.endswith(SCRIPTS) else []
    return [f"of the several runs in the file, the first: MODEL_ARGS, and not {', '.join(runs)}"] if runs else []


def _complete_cluster(args: argparse.Namespace) -> None:
    """Take --gpu and --gpus from the model file's cluster where they are not given."""
    has_cluster = not args.model[0].startswith("--") and not args.model[0].endswith(SCRIPTS)
    named = cluster(args.model[0]) if has_cluster else Cluster()
    args.gpu = named.gpu if args.gpu is None else args.gpu
    args.gpus = named.gpus if args.gpus is None else args.gpus
    missing = [flag for flag in ("--gpu", "--gpus") if getattr(args, flag[2:]) is None]
    if missing:
        wrong = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given"
        add = "Add --gpu KIND and --gpus N, or `cluster: {gpu: KIND, gpus: N}` to the model's file"
        raise UserError(f"{wrong}.\n  {add}.")


def _calibrated(request: Request, args: argparse.Namespace, flags: argparse.Namespace) -> GPU:
    """Return the GPU whose estimate is the measured step, and print how it differs from its profile."""
    strategy, before = strategy_of(flags, args.measured_gpus or args.gpus), request.gpu.matmul

    def step_s(gpu: GPU) -> float:
        return estimate(replace(request, gpu=gpu), strategy, exact=True).step.step

    gpu = request.gpu.calibrated(args.calibrate, step_s)
    print(f"calibrated: large matrix products achieve {gpu.matmul:.1%} of the peak ({before:.0%} in the profile)")
    return gpu


def _configured(request: Request, flags: argparse.Namespace) -> Found:
    """Estimate the one strategy that the flags name; nothing is found where it does not fit."""
    flags.global_batch_size = request.global_batch
    found = estimate(request, strategy_of(flags, request.num_gpus), exact=True)
    if found.memory.total > request.gpu.memory - request.reserve:
        return Found([], Counter({TOO_LARGE: 1}), 1, found.memory)
    return Found([found], Counter(), 1, None)


# The answer


def _title(request: Request) -> str:
    gpt = request.gpt
    size = f"{gpt.parameters / 1e9:.1f}B" if gpt.parameters >= 1e8 else f"{gpt.parameters / 1e6:.2f}M"
    active = f" ({gpt.active_parameters / 1e9:.1f}B active)" if gpt.experts else ""
    kind = "hybrid" if gpt.pattern else "GPT"
    return f"{kind} of {size} parameters{active}, {request.num_gpus} x {request.gpu.name}, {request.precision}"


def _print(args: argparse.Namespace, request: Request, found: dict[int, Found], notes: list[str]) -> None:
    print("\n".join([_title(request), *dict.fromkeys(notes)]))
    for batch, each in found.items():
        print(f"\nglobal batch {batch}: {table.rejections(each, args.rejected)}")
        if not each.estimates:
            continue
        if len(found) == 1 and not args.as_configured:
            # The late backward takes as long as the eager one and more memory: it would fill every second line.
            hidden = {"breadth-first-late"} - set(request.schedule)
            shown = [one for one in table.without_slower_twins(each.estimates) if one.strategy.schedule not in hidden]
            print(f"\nthe fastest:\n{table.ranking(shown[: args.top])}\n\nthe fastest of each schedule:")
        print(table.ranking(table.best_of_schedules(each)))
        fastest = each.estimates[0]
        environment = f"CUDA_DEVICE_MAX_CONNECTIONS={fastest.connections}"
        print(f"\nenvironment and flags of the fastest:\n  {environment}\n  {shlex.join(fastest.strategy.flags())}")
    if len(found) > 1:
        print("\n" + table.batches(found, request))
    print("\nPredictions, not measurements: docs/guide/planning.md says what they assume."
          " ~ is from a formula, the rest from the plan.")  # fmt: skip


def _as_json(request: Request, found: dict[int, Found], most: int, notes: list[str]) -> dict[str, object]:
    batches = [table.as_json(each, replace(request, global_batch=batch), most) for batch, each in found.items()]
    return {
        "gpu": request.gpu.name,
        "gpus": request.num_gpus,
        "precision": request.precision,
        "parameters": request.gpt.parameters,
        "matmul": request.gpu.matmul,
        "notes": list(dict.fromkeys(notes)),
        "batches": batches,
    }


def _fits_nowhere(request: Request, found: dict[int, Found], is_as_configured: bool) -> str:
    least = min((each.smallest.total for each in found.values() if each.smallest), default=None)
    considered = sum(each.considered for each in found.values())
    if least is None:
        reasons = sum((each.rejected for each in found.values()), Counter[str]())
        if not reasons:
            return ("no way to divide the model has all that --schedule, --pp and the others ask for.\n"
                    "  Lift one: no-pipeline takes --pp 1, every other --schedule at least 2.")  # fmt: skip
        why = reasons.most_common(1)[0][0]
        return (f"none of {considered} strategies for {request.num_gpus} GPUs is possible, most often: {why}.\n"
                "  --rejected lists all.")  # fmt: skip
    usable = (request.gpu.memory - request.reserve) / 1e9
    if is_as_configured:
        return (f"the flags' strategy does not fit: {least / 1e9:.1f} GB needed on a GPU of {request.num_gpus}, and"
                f" {usable:.1f} GB to use.\n  Divide, shard or recompute more, or leave out --as-configured: the search"
                " finds what fits.")  # fmt: skip
    return (
        f"the model fits nowhere: {request.num_gpus} GPUs with {usable:.1f} GB to use, and at least"
        f" {least / 1e9:.1f} GB needed on one ({considered} strategies).\n"
        "  Use more GPUs or larger ones, or lift a restriction; --rejected says why."
    )

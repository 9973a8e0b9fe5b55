"""bfpp bench: the schedules themselves, in real processes on emulated stages and an emulated network, without a GPU."""

import argparse
import sys
from functools import partial

from ..console.errors import UserError, require
from ..console.files import check_figure, check_wanted, write_wanted
from ..console.numbers import at_least, between
from ..console.progress import Steps
from ..schedule import PipelineShape
from ..schedule.lower import DEFAULT_HOP
from ..schedule.names import SCHEDULES
from .case import FREE, Case
from .results import Result, as_json, markdown, table
from .settings import Setting, settings

_MOST_RANKS = 128  # processes; their work waits for a core long before


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bench` to the commands of bfpp."""
    bench = commands.add_parser("bench", help="run the schedules on emulated stages and networks, without a GPU")
    _add_cases(bench)
    _add_emulation(bench)
    add, count = bench.add_argument, at_least(1, 10_000)
    add("--arm", action="append", choices=tuple(SCHEDULES), metavar="ARM",
        help=f"run this arm; may be repeated. One of {', '.join(SCHEDULES)}. Default: all")  # fmt: skip
    add("--repeat", type=count, default=2, help="steps of every arm, alternating between the arms; default 2")
    add("--json", metavar="PATH", help="write all that was measured")
    add("--markdown", metavar="PATH", help="write a table of the ratios, a row per case")
    add("--plot", metavar="PATH", help="write a picture of the ratios (PNG, SVG or PDF, by its ending)")
    bench.set_defaults(run=run)


def _add_cases(bench: argparse.ArgumentParser) -> None:
    add, time = bench.add_argument_group("cases").add_argument, between(0, 10_000)
    sets = "of cases; short, the default: 4 minutes; full: 20 to 25; split: where a split backward gains most"
    add("--set", choices=("short", "full", "split"), default="short", help=sets)
    add("--shape", action="append", type=_shape, metavar="PP,CHUNKS,MICROBATCHES", help="this one; may be repeated")
    add("--hop", type=time, action="append", help="latency between ranks, in forwards; may be repeated")
    add("--transfer", type=time, help="of a message at a card, in forwards: size / bandwidth")
    add("--reduction", type=time, help="of a chunk's gradients, in backwards of all its micro-batches")
    add("--gather", type=time, help="of a chunk's parameters, in forwards of all its micro-batches")
    add("--node-size", type=at_least(1, 10_000),
        help="pipeline ranks in a node, --hop and --transfer lead out of it; default 1")  # fmt: skip
    add("--node-hop", type=time, default=0.0, help="latency within a node, in forwards; default 0")
    add("--node-transfer", type=time, default=0.0, help="transfer within a node, in forwards; default 0")
    add("--model", metavar="FILE", help="of configs/: its strategy in slow motion, with the times of `bfpp plan`")
    add("--gpu", help="of --model: v100-32, a100-80, h100-80, h200, or the path of a profile")
    add("--gpus", type=at_least(1, 10**6), help="of --model: how many")


def _add_emulation(bench: argparse.ArgumentParser) -> None:
    add, count = bench.add_argument_group("emulation").add_argument, at_least(1, 10_000)
    add("--forward-ms", type=between(0.1, 10_000), default=15.0, help="of a chunk and micro-batch; default 15 ms")
    add("--backward-time", type=between(0.01, 10_000), default=2.0, help="of a backward, in forwards; default 2")
    weights = "of a split backward's second part, the weights' gradients (W), in forwards; default: half the backward"
    add("--weights-time", type=between(0.01, 10_000), help=weights)
    replicas = "replicas of the pipeline with reductions or gathers; default 2"
    add("--dp", type=at_least(2, 10_000), default=2, help=replicas)
    add("--buckets", type=count, default=1, help="of gradients in the first rank's first chunk; default 1")
    add("--connections", type=int, choices=(1, 32), help="hardware queues of a GPU (CUDA_DEVICE_MAX_CONNECTIONS): 1, or"
        " 32: one for each stream; default: 1 for a --model for which Megatron demands it, else 32")  # fmt: skip
    receives = f"the plugin's flag: for which latency it places receives, in forwards; default {DEFAULT_HOP}"
    add("--breadth-first-hop", type=between(0, 100), default=DEFAULT_HOP, metavar="C", help=receives)
    lag = "the plugin's flag: the most micro-batches whose weights' gradients a rank of breadth-first-deferred owes"
    add("--breadth-first-weight-lag", type=at_least(0, 10_000), metavar="K", help=lag)
    add("--shared-card", action="store_true", help="reductions and gathers share a card with the messages")
    add("--half-duplex", action="store_true", help="a card either sends or receives")
    spread = "standard deviation of every duration, as a part of it"
    add("--jitter", type=between(0, 0.99), default=0.0, help=spread)


def _shape(text: str) -> PipelineShape:
    try:
        pp_size, num_chunks, num_microbatches = map(int, text.split(","))
        return PipelineShape(pp_size, num_chunks, num_microbatches)
    except ValueError as error:
        reason = f" ({error})" if text.count(",") == 2 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not PP,CHUNKS,MICROBATCHES as in 4,2,8{reason}") from None


def run(args: argparse.Namespace) -> int:
    """Measure the cases, print their table and write the files."""
    if args.plot is not None:
        require("matplotlib", "--plot")
        check_figure(args.plot, "--plot")
    check_wanted(args, "json", "markdown", "plot")
    results = _measure(args, settings(args))
    print(table(results))
    write_wanted(args, json=lambda: as_json(results), markdown=lambda: markdown(results))
    if args.plot is not None:
        from .plot import plot

        plot(results, args.plot)
    return 0


def _report(bar: Steps, title: str, arm: str) -> None:
    bar.step(f"{title}: {arm}")


def _check_case(case: Case) -> None:
    """Raise UserError for more processes than a machine runs on time, or an arm whose order lacks this shape."""
    if case.ranks > _MOST_RANKS:
        replicas = f" x {case.replicas} replicas (--dp)" if case.replicas > 1 else ""
        raise UserError(
            f"PP {case.shape.pp_size}{replicas} is {case.ranks} processes; bfpp bench runs at most {_MOST_RANKS}.\n"
            "  Use a --shape of fewer pipeline ranks; bfpp show simulates any."
        )
    for arm in case.arms:
        named = SCHEDULES[arm]
        if named.order is not None and named.chunks:
            try:
                named.order(case.shape, None)
            except UserError as error:
                raise UserError(f"the arm {arm}: {error}\n  Or name the other arms with --arm.") from None


def _measure(args: argparse.Namespace, chosen: list[Setting]) -> list[Result]:
    from .processes import run_case

    for library in ("torch", "megatron"):
        require(library, "bfpp bench")
    cases = [setting.case(args, args.arm or list(SCHEDULES)) for setting in chosen]
    for case in cases:
        _check_case(case)
    steps = sum(len(case.arms) * len(case.variants) * case.repeat for case in cases)
    repeated, results = 0, []
    with Steps(steps, "starting the ranks", "bench") as bar:
        for case in cases:
            shape = case.shape
            title = f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}, {case.network}"
            found = run_case(case, partial(_report, bar, title))
            repeated += found.repeated
            results += [
                Result(arm, case, found.step_times_s[arm], found.step_times_s.get(arm + FREE), found.plans.get(arm))
                for arm in case.arms
            ]
    if repeated:
        print(f"{repeated} steps were run again: the machine was busy when the emulated work was due", file=sys.stderr)
    return results

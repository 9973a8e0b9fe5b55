"""bfpp bench: the schedules themselves, in real processes on emulated stages and an emulated network, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..console import progress
from ..console.errors import UserError
from ..console.files import write_whole
from ..schedule import PipelineShape
from ..schedule.costs import Costs, at
from .results import Result, as_json, markdown, table

if TYPE_CHECKING:  # Megatron takes seconds to import
    from .processes import Case

Sizes = tuple[int, int, int]  # pp, chunks, micro-batches


class Setting(NamedTuple):
    """A case of a set. hop, transfer: of a message, in forwards of a chunk. reduction, gather: of a chunk, in the backwards and
    the forwards of all its micro-batches; without both there is no data parallelism.
    """

    sizes: Sizes
    hop: float = 0.0
    transfer: float = 0.0
    reduction: float = 0.0
    gather: float = 0.0
    node_size: int = 1  # pipeline ranks in a node, within which a message takes the following two
    node_hop: float = 0.0
    node_transfer: float = 0.0

    @property
    def is_replicated(self) -> bool:
        return self.reduction > 0 or self.gather > 0

    @property
    def network(self) -> str:
        named = ("hop", self.hop), ("transfer", self.transfer), ("reduction", self.reduction), ("gather", self.gather)
        text = " + ".join(f"{name} {value:.3g}" for name, value in named if value) or "free"
        if self.node_size == 1:
            return text
        return f"{text}, nodes of {self.node_size} with hop {self.node_hop:.3g} + transfer {self.node_transfer:.3g}"


# With the defaults about 3 and 20 minutes (full with --repeat 1).
SHORT = [
    Setting((4, 2, 8), 0.5),
    Setting((4, 4, 8), 0.5),
    Setting((4, 4, 8), 0.25, 0.25),
    Setting((4, 4, 8), 0.0, 0.0, 1.0),
]
FULL = [Setting((4, 4, 8))]
FULL += [
    Setting((pp, chunks, times * pp), *message)
    for message in ((0.5, 0.0), (0.25, 0.25)) for pp in (4, 8) for chunks in (2, 4) for times in (2, 4)
]  # fmt: skip
FULL += [
    Setting(sizes, 0.5, 0.0, *collectives)
    for sizes, collectives in (((4, 4, 8), (1.0, 0.0)), ((4, 4, 8), (0.5, 0.5)), ((4, 4, 8), (1.0, 1.0)), ((4, 2, 8), (0.5, 0.5)),
                               ((4, 2, 8), (1.0, 1.0)), ((8, 4, 16), (1.0, 0.0)))
]  # fmt: skip


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="run the schedules on emulated stages and networks, without a GPU")
    bench.add_argument(
        "--set",
        choices=("short", "full"),
        default="short",
        help="of cases; short (the default) takes 3 minutes, full 15 to 20",
    )
    bench.add_argument("--shape", action="append", metavar="PP,CHUNKS,MICROBATCHES", help="this one; may be repeated")
    bench.add_argument("--hop", type=float, action="append", help="latency between ranks, in forwards; may be repeated")
    bench.add_argument(
        "--model",
        metavar="FILE",
        help="of configs/: its strategy in slow motion, with the times that `bfpp plan` estimates",
    )
    bench.add_argument("--gpu", help="of --model: v100-32, a100-80, h100-80, h200, or the path of a profile")
    bench.add_argument("--gpus", type=int, help="of --model: how many")
    bench.add_argument("--forward-ms", type=float, default=15.0, help="of a chunk and micro-batch; default 15 ms")
    bench.add_argument("--backward-time", type=float, default=2.0, help="of a backward, in forwards; default 2")
    bench.add_argument("--transfer", type=float, help="of a message at a card, in forwards: size / bandwidth")
    bench.add_argument("--reduction", type=float, help="of a chunk's gradients, in backwards of all its micro-batches")
    bench.add_argument("--gather", type=float, help="of a chunk's parameters, in forwards of all its micro-batches")
    bench.add_argument(
        "--dp", type=int, default=2, help="replicas of the pipeline where there are reductions or gathers; default 2"
    )
    bench.add_argument(
        "--buckets", type=int, default=1, help="of gradients in the first chunk of the first rank; default 1"
    )
    bench.add_argument(
        "--shared-card", action="store_true", help="reductions and gathers share a card with the messages"
    )
    bench.add_argument(
        "--node-size", type=int, help="pipeline ranks in a node; --hop and --transfer are between nodes. Default: 1"
    )
    bench.add_argument("--node-hop", type=float, default=0.0, help="latency within a node, in forwards; default 0")
    bench.add_argument(
        "--node-transfer", type=float, default=0.0, help="transfer within a node, in forwards; default 0"
    )
    bench.add_argument("--half-duplex", action="store_true", help="a card either sends or receives")
    bench.add_argument(
        "--jitter", type=float, default=0.0, help="standard deviation of every duration, as a part of it"
    )
    bench.add_argument(
        "--arm", action="append", help="run this arm, by its name in the table; may be repeated. Default: all"
    )
    bench.add_argument(
        "--repeat", type=int, default=2, help="steps of every arm, alternating between the arms; default 2"
    )
    bench.add_argument("--json", metavar="PATH", help="write all that was measured")
    bench.add_argument("--markdown", metavar="PATH", help="write a table of the ratios, a row per case")
    bench.add_argument("--plot", metavar="PATH", help="write a picture of the ratios (PNG, SVG or PDF, by its ending)")
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    results = _measure(args, settings(args))
    print(table(results))
    if args.json is not None:
        write_whole(args.json, json.dumps(as_json(results), indent=1) + "\n", "--json")
        print(f"wrote {args.json}")
    if args.markdown is not None:
        write_whole(args.markdown, markdown(results), "--markdown")
        print(f"wrote {args.markdown}")
    if args.plot is not None:
        from .plot import plot

        plot(results, args.plot)
        print(f"wrote {args.plot}")
    return 0


def settings(args: argparse.Namespace) -> list[Setting]:
    """The cases that the command line names. --model also sets the time of a backward."""
    for flag, value, least in (("--forward-ms", args.forward_ms, 0.1), ("--backward-time", args.backward_time, 0.01),
                               ("--repeat", args.repeat, 1), ("--transfer", args.transfer or 0, 0), ("--reduction", args.reduction or 0, 0),
                               ("--gather", args.gather or 0, 0), ("--dp", args.dp, 2), ("--buckets", args.buckets, 1),
                               ("--node-size", args.node_size or 1, 1), ("--node-hop", args.node_hop, 0),
                               ("--node-transfer", args.node_transfer, 0)):  # fmt: skip
        if not least <= value <= 10_000:
            raise UserError(f"{flag} is {value:g}; it must lie between {least:g} and 10000.")
    if args.model is not None:
        return [_of_model(args)]
    if args.node_size is None and (args.node_hop or args.node_transfer):
        raise UserError("--node-hop and --node-transfer are of messages within a node, and each rank has a node of its own.\n"
                        "  Add --node-size N.")  # fmt: skip
    if all(each is None for each in (args.shape, args.hop, args.transfer, args.reduction, args.gather, args.node_size)):
        return FULL if args.set == "full" else SHORT
    shapes = [_shape(text) for text in args.shape or ()] or list(dict.fromkeys(each.sizes for each in SHORT))
    hops = args.hop or ((0.5,) if args.transfer is None else (0.0,))
    rest = args.transfer or 0.0, args.reduction or 0.0, args.gather or 0.0
    node = args.node_size or 1, args.node_hop, args.node_transfer
    return [Setting(sizes, hop, *rest, *node) for sizes in shapes for hop in hops]


def _of_model(args: argparse.Namespace) -> Setting:
    """The strategy of a model's flags in slow motion: everything as long, in forwards of a chunk, as `estimate` says it is. The stages
    are equal here: each takes the mean.
    """
    from ..planner.command import model_words
    from ..planner.flags import gpt_of, parse, precision_of, strategy_of
    from ..planner.hardware import load_gpu
    from ..planner.time import durations

    given = [
        flag
        for flag in ("shape", "hop", "transfer", "reduction", "gather", "node_size")
        if getattr(args, flag) is not None
    ]
    if given or args.gpu is None or args.gpus is None:
        wrong = (
            f"--{given[0].replace('_', '-')} is set as well"
            if given
            else f"--{'gpu' if args.gpu is None else 'gpus'} is not"
        )
        raise UserError(f"--model takes its times from an estimate for --gpus of a --gpu, but {wrong}.")
    flags = parse(model_words([args.model]))
    gpu, strategy = load_gpu(args.gpu), strategy_of(flags, args.gpus)
    if strategy.pp < 2:
        raise UserError(f"{args.model} on {args.gpus} GPUs has no pipeline ranks, and so no schedule to run.")
    precision = precision_of(flags) or gpu.precision
    if not gpu.has(precision):
        raise UserError(f"{args.model} trains in {precision}, which {gpu.name} does not have.\n  Use another --gpu.")
    times = durations(gpt_of(flags), strategy, gpu, precision)
    forward, backward = sum(times.forward) / len(times.forward), sum(times.backward) / len(times.backward)
    count, args.backward_time = strategy.num_microbatches, backward / forward
    print(
        f"{args.model}, {strategy.dp} replicas of PP {strategy.pp} x TP {strategy.tp} on {gpu.name}: a forward of a chunk takes "
        f"{1e3 * forward:.3g} ms there and {args.forward_ms:g} ms here, a backward {args.backward_time:.2f} times that"
    )
    collectives = (
        (times.reduction / (count * backward), times.gather / (count * forward)) if strategy.dp > 1 else (0.0, 0.0)
    )
    # Where nodes hold a number of whole pipeline ranks; else some messages of every edge cross, but for a few edges.
    in_node = max(1, gpu.gpus_per_node // (strategy.tp * strategy.dp))
    edges = gpu.crosses(strategy.tp * strategy.dp, strategy.pp)
    is_regular = strategy.shape.edges_between_nodes(in_node) == edges
    messages = [(at(times.hop, edge) / forward, at(times.transfer, edge) / forward) for edge in range(strategy.pp)]
    slow = next((each for each, crosses in zip(messages, edges, strict=True) if crosses), messages[0])
    sizes = strategy.pp, strategy.chunks, count
    if not is_regular or all(edges) or not any(edges):
        return Setting(sizes, *slow, *collectives)
    return Setting(sizes, *slow, *collectives, in_node, *messages[edges.index(False)])


def _shape(text: str) -> Sizes:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--shape {text} is not PP,CHUNKS,MICROBATCHES.\n  Write it as 4,2,8.")
    pp, chunks, microbatches = map(int, parts)
    return pp, chunks, microbatches


def _measure(args: argparse.Namespace, chosen: list[Setting]) -> list[Result]:
    # Here and in the ranks Megatron warns of every library that it could use and a CPU does without.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    from .processes import ARMS, FREE, SHARDED, run_case

    arms = tuple(args.arm or ARMS)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arm {unknown[0]} does not exist.\n  Use one of {', '.join(ARMS)}.")
    cases = [
        _case(args, setting, arms if setting.is_replicated else tuple(arm for arm in arms if arm != SHARDED))
        for setting in chosen
    ]
    repeated, bar, results = 0, _Progress(sum(len(case.arms) * len(case.variants) * args.repeat for case in cases)), []
    for setting, case in zip(chosen, cases, strict=True):
        shape = case.shape
        title = f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}, {setting.network}"
        found = run_case(case, partial(bar.step, title))
        repeated += found.repeated
        costs = _costs(case, setting, args.shared_card)
        results += [
            Result(
                arm,
                shape,
                setting.network,
                costs,
                found.step_times_s[arm],
                found.step_times_s.get(arm + FREE),
                found.plans.get(arm),
            )
            for arm in case.arms
        ]
    bar.end()
    if repeated:
        print(f"{repeated} steps were run again: the machine was busy when the emulated work was due", file=sys.stderr)
    return results


def _costs(case: Case, setting: Setting, shared_card: bool) -> Costs:
    times, link, replicas, forward_s = case.times, case.link, case.replicas, case.times.forward_s
    of_chunks = replicas.gather_s, replicas.reduction_s, replicas.buckets
    if setting.node_size == 1:
        return Costs(
            times.forward_s, times.backward_s, link.latency_s, setting.transfer * forward_s, *of_chunks, shared_card
        )
    crosses = case.shape.edges_between_nodes(setting.node_size)
    hop = [link.latency_s if each else link.node_latency_s for each in crosses]
    transfer = [(setting.transfer if each else setting.node_transfer) * forward_s for each in crosses]
    shared = [shared_card and each for each in crosses]
    return Costs(times.forward_s, times.backward_s, hop, transfer, *of_chunks, shared)


def _case(args: argparse.Namespace, setting: Setting, arms: tuple[str, ...]) -> Case:
    from .data_parallel import ALONE, ReplicaTimes
    from .emulate.network import Link
    from .emulate.stages import StageTimes
    from .processes import Case

    shape, forward_s = PipelineShape(*setting.sizes), args.forward_ms / 1e3
    times = StageTimes(forward_s, forward_s * args.backward_time)
    # Messages of one byte on a card that needs the transfer time for it: only the quotient counts.
    bandwidth, of_node = (
        1 / (each * forward_s) if each else float("inf") for each in (setting.transfer, setting.node_transfer)
    )
    link = Link(setting.network, setting.hop * forward_s, bandwidth, not args.half_duplex, args.shared_card, args.jitter,
                setting.node_size, setting.node_hop * forward_s, of_node)  # fmt: skip
    replicas = ALONE
    if setting.is_replicated:
        of_all = shape.num_microbatches
        replicas = ReplicaTimes(
            args.dp,
            setting.reduction * of_all * times.backward_s,
            setting.gather * of_all * times.forward_s,
            args.buckets,
        )
    return Case(shape, times, link, 1.0, replicas, arms, args.repeat)


class _Progress:
    """A bar on a terminal, on standard error: the table can be piped."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.monotonic()

    def step(self, title: str, arm: str, step_s: float) -> None:
        self.done += 1
        if sys.stderr.isatty():
            left_s = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            progress.show(self.done / self.total, f"{title}: {arm}, about {left_s:.0f} s left")
        elif self.done % max(1, self.total // 20) == 0:
            print(f"bench: {self.done} of {self.total} steps", file=sys.stderr, flush=True)

    def end(self) -> None:
        progress.clear()

"""bfpp bench: the schedules themselves, in real processes on emulated stages and an emulated network, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial

from .errors import UserError
from .files import write_whole
from .report.bench import Result, as_json, table
from .schedule import PipelineShape
from .schedule.replay import Costs

Sizes = tuple[int, int, int]  # pp, chunks, micro-batches

# Sizes, latency and transfer of a message in forwards. With the defaults about 2 and 15 minutes.
SHORT: list[tuple[Sizes, float, float]] = [((4, 2, 8), 0.5, 0.0), ((4, 4, 8), 0.5, 0.0), ((4, 4, 8), 0.25, 0.25)]
FULL: list[tuple[Sizes, float, float]] = [((4, 4, 8), 0.0, 0.0)] + [
    ((pp, chunks, times * pp), hop, transfer)
    for hop, transfer in ((0.5, 0.0), (0.25, 0.25)) for pp in (4, 8) for chunks in (2, 4) for times in (2, 4)
]  # fmt: skip


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="run the schedules on emulated stages and networks, without a GPU")
    bench.add_argument("--set", choices=("short", "full"), default="short", help="of shapes; short (the default) takes 2 minutes, full 15")
    bench.add_argument("--shape", action="append", metavar="PP,CHUNKS,MICROBATCHES", help="this one; may be repeated")
    bench.add_argument("--hop", type=float, action="append", help="latency between ranks, in forwards; may be repeated")
    bench.add_argument("--forward-ms", type=float, default=15.0, help="of a chunk and micro-batch; default 15 ms")
    bench.add_argument("--backward-time", type=float, default=2.0, help="of a backward, in forwards; default 2")
    bench.add_argument("--transfer", type=float, help="of a message at a card, in forwards: size / bandwidth")
    bench.add_argument("--half-duplex", action="store_true", help="a card either sends or receives")
    bench.add_argument("--jitter", type=float, default=0.0, help="standard deviation of every duration, as a part of it")
    bench.add_argument("--arm", action="append", help="run this arm, by its name in the table; may be repeated. Default: all")
    bench.add_argument("--repeat", type=int, default=2, help="steps of every arm, alternating between the arms; default 2")
    bench.add_argument("--json", metavar="PATH", help="write all that was measured")
    bench.add_argument("--plot", metavar="PATH", help="write a picture of the ratios (PNG, SVG or PDF, by its ending)")
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    cases = _cases(args)
    results = _measure(args, cases)
    print(table(results))
    if args.json is not None:
        write_whole(args.json, json.dumps(as_json(results), indent=1) + "\n", "--json")
        print(f"wrote {args.json}")
    if args.plot is not None:
        from .report.bench_plot import plot

        plot(results, args.plot)
        print(f"wrote {args.plot}")
    return 0


def _cases(args: argparse.Namespace) -> list[tuple[PipelineShape, float, float]]:
    """Shapes with the latency and the transfer of a message, in forwards."""
    for flag, value, least in (("--forward-ms", args.forward_ms, 0.1), ("--backward-time", args.backward_time, 0.01),
                               ("--repeat", args.repeat, 1), ("--transfer", args.transfer or 0, 0)):  # fmt: skip
        if not least <= value <= 10_000:
            raise UserError(f"{flag} is {value:g}; it must lie between {least:g} and 10000.")
    if args.shape is None and args.hop is None and args.transfer is None:
        chosen = FULL if args.set == "full" else SHORT
    else:
        shapes = [_shape(text) for text in args.shape or ()] or list(dict.fromkeys(sizes for sizes, _, _ in SHORT))
        hops = args.hop or ((0.5,) if args.transfer is None else (0.0,))
        chosen = [(sizes, hop, args.transfer or 0.0) for sizes in shapes for hop in hops]
    return [(PipelineShape(*sizes), hop, transfer) for sizes, hop, transfer in chosen]


def _shape(text: str) -> Sizes:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--shape {text} is not PP,CHUNKS,MICROBATCHES.\n  Write it as 4,2,8.")
    pp, chunks, microbatches = map(int, parts)
    return pp, chunks, microbatches


def _measure(args: argparse.Namespace, cases: list[tuple[PipelineShape, float, float]]) -> list[Result]:
    # Here and in the ranks Megatron warns of every library that it could use and a CPU does without.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    from .emulate.network import Link
    from .emulate.stages import StageTimes
    from .integration.bench import ARMS, Case, run_case

    arms = tuple(args.arm or ARMS)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arm {unknown[0]} does not exist.\n  Use one of {', '.join(ARMS)}.")
    forward_s = args.forward_ms / 1e3
    times = StageTimes(forward_s, forward_s * args.backward_time)
    progress, results = _Progress(len(cases) * len(arms) * args.repeat), []
    for shape, hop, transfer in cases:
        # Messages of one byte on a card that needs the transfer time for it: only the quotient counts.
        bandwidth = 1 / (transfer * forward_s) if transfer else float("inf")
        name = f"hop {hop:g}" + (f" + transfer {transfer:g}" if transfer else "")
        link = Link(name, hop * forward_s, bandwidth, not args.half_duplex, args.jitter)
        title = f"PP {shape.pp_size} x {shape.num_chunks}, M {shape.num_microbatches}, {name}"
        found = run_case(Case(shape, times, link, 1.0, arms, args.repeat), partial(progress.step, title))
        costs = Costs(times.forward_s, times.backward_s, link.latency_s, transfer * forward_s)
        results += [Result(arm, shape, name, costs, step_times) for arm, step_times in found.items()]
    progress.end()
    return results


class _Progress:
    """A bar on a terminal, on standard error: the table can be piped."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.monotonic()

    def step(self, title: str, arm: str, step_s: float) -> None:
        self.done += 1
        if sys.stderr.isatty():
            left_s = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            bar = "#" * (20 * self.done // self.total)
            print(f"\r\033[K[{bar:<20}] {title}: {arm}, about {left_s:.0f} s left", end="", file=sys.stderr, flush=True)
        elif self.done % max(1, self.total // 20) == 0:
            print(f"bench: {self.done} of {self.total} steps", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)

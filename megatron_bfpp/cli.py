"""bfpp: look at a schedule, prove a plan, plan a job, without torch and without Megatron; try a job without its GPUs;
run schedules on an emulated network.

    bfpp show --pp 4 --chunks 2 --microbatches 8 --svg breadth_first.svg
    bfpp compare ab/*.* --html report.html
    bfpp check plan.csv
    bfpp check --config configs/gpt_52b_64_v100.yaml --gpu v100-32
    bfpp plan configs/gpt_52b.yaml --gpu h100-80 --gpus 64 --global-batch 64
    bfpp bench --plot bench.png
    bfpp trace RUN/trace.json --svg timeline.svg
    bfpp doctor

Exit codes: 0 good, 1 found wrong, 2 bad input.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from typing import NoReturn

from . import __version__, bench, compare, doctor, dry_run, plan
from .errors import UserError, shown
from .files import write_whole
from .report import timeline as trace
from .report.grid import grid, summary
from .report.page import page
from .report.picture import svg
from .report.picture_png import png
from .schedule import (
    Action,
    Op,
    PipelineShape,
    Schedule,
    ScheduleError,
    breadth_first,
    check,
    formats,
    interleaved_1f1b,
    lower,
    simulate,
)
from .schedule.ir import COMPUTE

MOST_ACTIONS = 1_000_000  # that `bfpp show` draws: 20 seconds, and a picture of 100 MB


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(_without_empty_values(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args))
    except (UserError, ValueError) as error:
        # The schedule package, which users can call without us, raises ValueError for a shape that cannot be.
        print(f"bfpp {args.command}: {shown(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `bfpp show | head`
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    """Its errors name what is wrong and where the flags are listed, without the list itself."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {shown(message)}\n  {self.prog} --help lists the flags.", file=sys.stderr)
        sys.exit(2)


def _without_empty_values(words: list[str]) -> list[str]:
    """The same words. Before Python 3.13 argparse takes the -- out of --flag=-- and gives the flag an empty list."""
    ours = words[: words.index("--")] if "--" in words else words
    for word in ours:
        if word.startswith("--") and word.endswith("=--"):
            _Parser(prog="bfpp").error(f"argument {word.removesuffix('=--')}: expected one argument")
    return words


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    bfpp: argparse.ArgumentParser = _Parser(prog="bfpp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    bfpp.add_argument("--version", action="version", version=f"megatron_bfpp {__version__}")
    commands = bfpp.add_subparsers(dest="command", required=True, metavar="{show,check,plan,bench,trace,compare,doctor}")

    show = commands.add_parser("show", help="draw a schedule as text, SVG or CSV")
    show.add_argument("--pp", type=int, required=True, help="pipeline ranks, at least 2")
    show.add_argument("--chunks", type=int, required=True, help="model chunks (virtual pipeline stages) per rank")
    show.add_argument("--microbatches", type=int, required=True, help="micro-batches per step and replica")
    show.add_argument("--order", action="append", choices=("breadth-first", "1f1b"),
                      help="may be given twice: both on one time axis. Default: breadth-first")  # fmt: skip
    show.add_argument("--group", type=int, help="micro-batches per group; default: all (breadth-first), ranks (1f1b)")
    show.add_argument("--backward", choices=("eager", "late"), default="eager", help="of breadth-first")
    show.add_argument("--backward-time", type=float, default=2.0, help="of a backward, in forwards; default 2")
    show.add_argument("--hop", type=float, default=0.0, help="time of a message between ranks, in forwards; default 0")
    show.add_argument("--svg", metavar="PATH", help="write the picture")
    show.add_argument("--png", metavar="PATH", help="write it as PNG; needs matplotlib")
    show.add_argument("--html", metavar="PATH", help="write it as a page of its own, with the numbers")
    show.add_argument("--csv", metavar="PATH", help="write the order in torch.distributed.pipelining's format")
    show.add_argument("--plan", action="store_true", help="with sends and receives, in --csv and --text")
    show.add_argument("--resident-chunks", type=int, help="of fully sharded parameters, in --plan: gathered at one time")
    show.add_argument("--text", action="store_true", help="print the actions of each rank instead of the grid")
    show.add_argument("--wide", action="store_true", help="do not cut the grid at the terminal's width")
    show.set_defaults(run=_show)

    prove = commands.add_parser("check", help="prove a plan free of deadlock; try a job's configuration without a GPU")
    what = "CSV or text of a plan, as `bfpp show --plan` writes it, - for standard input; or -- and Megatron's flags"
    prove.add_argument("file", nargs="*", help=what)
    given = "of the shape; default: what the file's stages and micro-batches say"
    prove.add_argument("--pp", type=int, help=f"pipeline ranks {given}")
    prove.add_argument("--chunks", type=int, help="model chunks per rank")
    prove.add_argument("--microbatches", type=int, help="micro-batches")
    dry_run.add_arguments(prove)
    prove.set_defaults(run=_check)
    compare.add_command(commands)
    plan.add_command(commands)
    bench.add_command(commands)
    trace.add_command(commands)
    doctor.add_command(commands)
    return bfpp


def _show(args: argparse.Namespace) -> int:
    # The bounds keep a slip of the keyboard from a grid of a billion columns.
    for flag, value, least in (("--backward-time", args.backward_time, 0.01), ("--hop", args.hop, 0.0)):
        if not (math.isfinite(value) and least <= value <= 100):
            raise UserError(f"{flag} is {value:g} forwards; it must lie between {least:g} and 100.")
    shape = PipelineShape(args.pp, args.chunks, args.microbatches)
    if 2 * shape.num_stages * shape.num_microbatches > MOST_ACTIONS:
        raise UserError(f"{_title(shape)} are more than {MOST_ACTIONS} forwards and backwards.\n  Show a smaller pipeline.")
    names = list(dict.fromkeys(args.order or ["breadth-first"]))
    if (args.csv is not None or args.text) and len(names) > 1:
        flag = "--csv" if args.csv is not None else "--text"
        raise UserError(f"{flag} holds one schedule, but --order was given twice.\n  Leave out one --order.")
    orders = {name: _order(name, shape, args) for name in names}
    timelines = [(name, simulate(orders[name], shape, 1.0, args.backward_time, args.hop)) for name in names]
    width = None if args.wide or not sys.stdout.isatty() else shutil.get_terminal_size().columns
    for name, timeline in timelines:
        if args.text:
            print(formats.to_text(_lowered(orders[name], shape, args)), end="")
        else:
            if len(names) > 1:
                print(f"{name}:")
            print(grid(timeline, width=width))
            print(summary(timeline))
    if args.csv is not None:
        write_whole(args.csv, formats.to_csv(_lowered(orders[names[0]], shape, args)), "--csv")
        print(f"wrote {args.csv}")
    if args.svg is not None:
        write_whole(args.svg, svg(timelines), "--svg")
        print(f"wrote {args.svg}")
    if args.html is not None:
        write_whole(args.html, page(timelines), "--html")
        print(f"wrote {args.html}")
    if args.png is not None:
        png(timelines, args.png)
        print(f"wrote {args.png}")
    return 0


def _order(name: str, shape: PipelineShape, args: argparse.Namespace) -> Schedule:
    if name == "1f1b":
        return interleaved_1f1b(shape, args.group)
    return breadth_first(shape, args.group, eager_backward=args.backward == "eager")


def _lowered(order: Schedule, shape: PipelineShape, args: argparse.Namespace) -> Schedule:
    return lower(order, shape, resident_chunks=args.resident_chunks) if args.plan else order


def _check(args: argparse.Namespace) -> int:
    files = [word for word in args.file[:1] if not word.startswith("--")]
    if not files and (args.config is not None or args.file):
        return dry_run.run(args, args.file)
    if len(files) != len(args.file) or not files or args.config is not None:
        raise UserError(
            "one thing is checked at a time.\n  Give the FILE of a plan, or --config YAML, or -- and Megatron's flags."
        )
    return _check_plan(args, files[0])


def _check_plan(args: argparse.Namespace, path: str) -> int:
    plan = _read(path)
    actions = [action for rank in plan for action in rank if action.op in COMPUTE]
    if not actions:
        raise UserError(f"{path} holds no forward or backward.\n  Write one with: bfpp show ... --plan --csv FILE")
    shape = _shape_of(plan, actions, args, path)
    try:
        check(plan, shape, forward_only=all(action.op is Op.F for action in actions))
    except ScheduleError as error:
        print(f"unsound as {_title(shape)}: {error}")
        return 1
    print(f"sound: {_title(shape)}, {sum(map(len, plan))} actions, plan {formats.digest(plan)}")
    return 0


def _shape_of(plan: Schedule, actions: list[Action], args: argparse.Namespace, path: str) -> PipelineShape:
    """The shape that the user gave, completed by what the file's numbers say."""
    size = len(plan) if args.pp is None else args.pp
    microbatches, chunks = args.microbatches, args.chunks
    if microbatches is None:
        microbatches = 1 + max(action.microbatch or 0 for action in actions)
    if chunks is None:
        chunks = -(-(1 + max(action.stage for action in actions)) // max(1, size))
    shape = PipelineShape(size, chunks, microbatches)
    if shape.num_stages * microbatches > 2 * len(actions) + 1000:
        # One damaged number; listing all that is missing would take for ever.
        raise UserError(
            f"{path}: {len(actions)} forwards and backwards are too few for {_title(shape)}.\n"
            "  Name the shape that is meant: --pp, --chunks, --microbatches."
        )
    return shape


def _title(shape: PipelineShape) -> str:
    return f"PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches"


def _read(path: str) -> Schedule:
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}.") from None
    text = text.rstrip() + "\n"  # an empty line at the end is no rank
    try:
        return (formats.from_csv if "," in text else formats.from_text)(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

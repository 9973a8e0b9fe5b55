"""bfpp show: schedules as text, pictures, CSV and Chrome traces, planned and not measured. Neither torch nor Megatron."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

from ..console.errors import UserError, require
from ..console.files import write_whole
from ..schedule import Op, PipelineShape, Schedule, ScheduleError, Timeline, check, formats, lower
from ..schedule.collectives import Costs
from ..schedule.ir import COMPUTE
from ..schedule.names import ORDERS, aligned, order_of, waits_of
from ..schedule.plan_file import read, shape_of, title
from ..schedule.replay import Prediction, replay
from .grid import grid, summary
from .page import page
from .picture import picture

MOST_ACTIONS = 1_000_000  # that are drawn: 20 seconds, and a picture of 100 MB


class Shown(NamedTuple):
    """A schedule by its name. order: as it was given or made; plan: with its sends and receives."""

    name: str
    order: Schedule
    plan: Schedule
    predicted: Prediction


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = commands.add_parser("show", help="draw a schedule as text, SVG, PNG, HTML, CSV or a Chrome trace")
    show.add_argument(
        "file",
        nargs="*",
        help="CSV or text of an order or a plan, also torch's, or - for standard input; may be several",
    )
    show.add_argument("--pp", type=int, help="pipeline ranks, at least 2")
    show.add_argument("--chunks", type=int, help="model chunks (virtual pipeline stages) per rank")
    show.add_argument("--microbatches", type=int, help="micro-batches per step and replica")
    show.add_argument("--order", action="append", choices=ORDERS, metavar="NAME",
                      help=f"one of {', '.join(ORDERS)}; may be repeated: all on one time axis. Default: breadth-first. 1f1b has "
                           "no chunks: those of a rank are its one stage, as long as all of them")  # fmt: skip
    show.add_argument(
        "--group", type=int, help="micro-batches per group; default: all (breadth-first), ranks (interleaved)"
    )
    show.add_argument(
        "--backward",
        choices=("eager", "late"),
        default="eager",
        help="late: breadth-first stands for breadth-first-late",
    )
    show.add_argument("--backward-time", type=float, default=2.0, help="of a backward, in forwards; default 2")
    for flag, meaning in _TIMES.items():
        show.add_argument(flag, type=float, default=0.0, help=f"{meaning}, in forwards; default 0")
    show.add_argument("--svg", metavar="PATH", help="write the picture")
    show.add_argument("--png", metavar="PATH", help="write it as PNG; needs matplotlib")
    show.add_argument("--html", metavar="PATH", help="write it as a page of its own, with the numbers")
    show.add_argument(
        "--trace", metavar="PATH", help="write the planned step as a Chrome trace for Perfetto, a forward as 1 ms"
    )
    show.add_argument("--csv", metavar="PATH", help="write the order in torch.distributed.pipelining's format")
    show.add_argument("--plan", action="store_true", help="with sends and receives, in --csv and --text")
    show.add_argument(
        "--resident-chunks", type=int, help="of fully sharded parameters, in the plan: gathered at one time"
    )
    show.add_argument("--text", action="store_true", help="print the actions of each rank instead of the grid")
    show.add_argument("--wide", action="store_true", help="do not cut the grid at the terminal's width")
    show.set_defaults(run=run)


_TIMES = {
    "--hop": "latency of a message between ranks",
    "--transfer": "time that a message takes its channel",
    "--gather": "time that a gather of a chunk's parameters takes",
    "--reduction": "time that a reduction of a chunk's gradients takes",
}

_NOUNS = {
    "--hop": "a message's latency",
    "--transfer": "its transfer",
    "--gather": "a gather of a chunk's parameters",
    "--reduction": "a reduction of a chunk's gradients",
}


def run(args: argparse.Namespace) -> int:
    if args.png is not None:
        require("matplotlib", "--png")
    # The bounds keep a slip of the keyboard from a grid of a billion columns.
    for flag, least in (("--backward-time", 0.01), *((flag, 0.0) for flag in _TIMES)):
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if not (math.isfinite(value) and least <= value <= 100):
            raise UserError(f"{flag} is {value:g} forwards; it must lie between {least:g} and 100.")
    shown = _shown(args)
    if (args.csv is not None or args.text) and len(shown) > 1:
        flag = "--csv" if args.csv is not None else "--text"
        raise UserError(
            f"{flag} holds one schedule, and {len(shown)} are named.\n  Leave out all but one --order or file."
        )
    _print(args, shown)
    _write(args, shown)
    return 0


def _shown(args: argparse.Namespace) -> list[Shown]:
    if args.file and args.group is not None and not args.order:
        raise UserError("--group is of an --order, and a file has its own.\n  Leave it out.")
    found = [_of_file(args, path) for path in args.file]
    if args.order or not args.file:
        sizes = (args.pp, args.chunks, args.microbatches)
        missing = [
            flag for flag, size in zip(("--pp", "--chunks", "--microbatches"), sizes, strict=True) if size is None
        ]
        if missing:
            raise UserError(
                f"{', '.join(missing)} is not given.\n  Give all three sizes of the pipeline, or the FILE of an order."
            )
        shape = PipelineShape(args.pp, args.chunks, args.microbatches)
        if 2 * shape.num_stages * shape.num_microbatches > MOST_ACTIONS:
            raise UserError(
                f"{title(shape)} are more than {MOST_ACTIONS} forwards and backwards.\n  Show a smaller pipeline."
            )
        names = [
            f"{name}-late" if name == "breadth-first" and args.backward == "late" else name
            for name in args.order or ["breadth-first"]
        ]
        found += [_of_name(args, name, shape) for name in dict.fromkeys(names)]
    return found


def _of_name(args: argparse.Namespace, name: str, shape: PipelineShape) -> Shown:
    costs, chunks = _costs(args), 1
    if name == "1f1b":  # the chunks of a rank in a row
        chunks, shape = shape.num_chunks, PipelineShape(shape.pp_size, 1, shape.num_microbatches)
        costs = Costs(
            float(chunks),
            args.backward_time * chunks,
            args.hop,
            args.transfer,
            args.gather * chunks,
            args.reduction * chunks,
        )
    order = order_of(name, shape, args.group)
    plan = lower(order, shape, resident_chunks=args.resident_chunks)
    running = aligned(plan, shape) if name.startswith("interleaved") and args.resident_chunks is None else plan
    predicted = replay(running, shape, costs, waits_of(name))
    return Shown(name, order, plan, replace(predicted, chunks_per_stage=chunks))


def _of_file(args: argparse.Namespace, path: str) -> Shown:
    """Of a plan its own sends and receives, to an order they are added. UserError where no rank could go on."""
    given = read(path)
    shape = shape_of(given, None, None, None, path)
    name = "standard input" if path == "-" else os.path.basename(path)
    order = [[action for action in rank if action.op in COMPUTE] for rank in given]
    is_plan = any(action.op not in COMPUTE for rank in given for action in rank)
    try:
        plan = given if is_plan else lower(order, shape, resident_chunks=args.resident_chunks)
        check(plan, shape, forward_only=all(action.op is Op.F for rank in order for action in rank))
        return Shown(name, order, plan, replay(plan, shape, _costs(args)))
    except ScheduleError as error:
        raise UserError(
            f"{path} cannot run: {str(error).splitlines()[0]}\n  bfpp check says all that is wrong with a plan."
        ) from None


def _costs(args: argparse.Namespace) -> Costs:
    return Costs(1.0, args.backward_time, args.hop, args.transfer, args.gather, args.reduction)


def _note(args: argparse.Namespace) -> str:
    """Say in the picture what was assumed."""
    given = {flag: getattr(args, flag.removeprefix("--")) for flag in _TIMES}
    times = [f"{_NOUNS[flag]} {value:g}" for flag, value in given.items() if value]
    return (
        ", ".join([f"Planned, not measured. In forwards of a chunk: a backward takes {args.backward_time:g}", *times])
        + "."
    )


def _print(args: argparse.Namespace, shown: list[Shown]) -> None:
    width = None if args.wide or not sys.stdout.isatty() else shutil.get_terminal_size().columns
    for each in shown:
        if args.text:
            print(formats.to_text(each.plan if args.plan else each.order), end="")
            continue
        if len(shown) > 1 or args.file:
            print(f"{each.name}:")
        print(grid(each.predicted, width=width))
        print(summary(each.predicted))


def _write(args: argparse.Namespace, shown: list[Shown]) -> None:
    timelines: list[tuple[str, Timeline]] = [(each.name, each.predicted) for each in shown]
    if args.csv is not None:
        write_whole(args.csv, formats.to_csv(shown[0].plan if args.plan else shown[0].order), "--csv")
        print(f"wrote {args.csv}")
    if args.svg is not None:
        write_whole(args.svg, picture(timelines, note=_note(args)).svg(), "--svg")
        print(f"wrote {args.svg}")
    if args.html is not None:
        write_whole(args.html, page(timelines, _note(args)), "--html")
        print(f"wrote {args.html}")
    if args.png is not None:
        picture(timelines, note=_note(args)).png(args.png, "--png")
        print(f"wrote {args.png}")
    if args.trace is not None:
        from .planned import document

        write_whole(args.trace, json.dumps(document([(each.name, each.predicted) for each in shown])) + "\n", "--trace")
        print(f"wrote {args.trace}")

"""bfpp show: schedules as text, pictures, CSV and Chrome traces; planned, not measured. Neither torch nor Megatron."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

from ..console.errors import UserError, require
from ..console.files import write_wanted
from ..console.numbers import at_least, between
from ..schedule import Op, PipelineShape, Schedule, ScheduleError, check, formats, lower
from ..schedule.costs import Costs
from ..schedule.formats import read, shape_of, title
from ..schedule.ir import COMPUTE
from ..schedule.lower import DEFAULT_HOP
from ..schedule.names import DEFERRED, ORDERS, SCHEDULES, order_of, predict, word_of
from ..schedule.orders import split_backward
from ..schedule.plan import choose_weight_lags
from ..schedule.replay import Prediction, replay
from .grid import grid, summary
from .page import page
from .picture import picture
from .planned import document

_LEAST = 0.01  # of the times of actions: a column of the grid is as long as the shortest
MOST_ACTIONS = 1_000_000  # that are drawn: 20 seconds, and a picture of 100 MB

_TIMES = {  # flag: its help, its name in a picture
    "hop": ("latency of a message between ranks", "latency of a message"),
    "transfer": ("time that a message takes its channel", "its transfer"),
    "gather": ("time of a gather of a chunk's parameters", "gather of a chunk"),
    "reduction": ("time of a reduction of a chunk's gradients", "reduction of a chunk"),
}


class Shown(NamedTuple):
    """A schedule by its name. order: as it was given or made; plan: with its sends and receives."""

    name: str
    order: Schedule
    plan: Schedule
    predicted: Prediction


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp show` to the subcommands."""
    show = commands.add_parser("show", help="draw a schedule as text, SVG, PNG, HTML, CSV or a Chrome trace")
    add = show.add_argument
    add("file", nargs="*", help="CSV or text of orders or plans, also torch's; - for standard input")
    add("--pp", type=int, help="pipeline ranks, at least 2")
    add("--chunks", type=int, help="model chunks (virtual pipeline stages) per rank")
    add("--microbatches", type=int, help="micro-batches per step and replica")
    order = (
        f"one of {', '.join(ORDERS)}; may be repeated: all on one time axis. Default: breadth-first. "
        "1f1b has no chunks: those of a rank are its one stage, as long as all of them"
    )
    add("--order", action="append", choices=ORDERS, metavar="NAME", help=order)
    add("--group", type=int, help="micro-batches per group; default: all (breadth-first), ranks (interleaved)")
    late = "late: breadth-first stands for breadth-first-late"
    add("--backward", choices=("eager", "late"), default="eager", help=late)
    lag = (
        "the plugin's --breadth-first-weight-lag, of breadth-first-deferred: most micro-batches whose weights' "
        "gradients wait on a rank; default: r or a few more on rank r, as in a job"
    )
    add("--weight-lag", type=at_least(0), metavar="K", help=lag)
    # The bounds keep a slip of the keyboard from a grid of a billion columns.
    backward = "of a backward, in forwards; default 2"
    add("--backward-time", type=between(_LEAST, 100), default=2.0, help=backward)
    weights = "of the weights' gradient, which is a part of a split backward, in forwards; default half of it"
    add("--weights-time", type=between(_LEAST, 100), metavar="W", help=weights)
    for flag, (meaning, _) in _TIMES.items():
        add(f"--{flag}", type=between(0, 100), default=0.0, help=f"{meaning}, in forwards; default 0")
    receives = f"the plugin's flag: for which latency it places receives, in forwards; default {DEFAULT_HOP}"
    add("--breadth-first-hop", type=between(0, 100), default=DEFAULT_HOP, metavar="C", help=receives)
    queues = "hardware queues of a GPU (CUDA_DEVICE_MAX_CONNECTIONS): 1, or 32, the default: one for each stream"
    add("--connections", type=int, choices=(1, 32), default=32, help=queues)
    add("--svg", metavar="PATH", help="write the picture")
    add("--png", metavar="PATH", help="write it as PNG; needs matplotlib")
    add("--html", metavar="PATH", help="write it as a page of its own, with the numbers")
    add("--trace", metavar="PATH", help="write the planned step as a Chrome trace for Perfetto, a forward as 1 ms")
    add("--csv", metavar="PATH", help="write the order in torch.distributed.pipelining's format")
    add("--plan", action="store_true", help="with sends and receives, in --csv and --text")
    add("--resident-chunks", type=int, help="of fully sharded parameters, in the plan: gathered at one time")
    add("--text", action="store_true", help="print the actions of each rank instead of the grid")
    add("--wide", action="store_true", help="do not cut the grid at the terminal's width")
    show.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.png is not None:
        require("matplotlib", "--png")
    if args.html is not None:
        require("jinja2", "--html")
    if args.weights_time is not None and args.weights_time > args.backward_time - _LEAST:
        raise UserError(
            f"--weights-time {args.weights_time:g} leaves less than {_LEAST} of --backward-time {args.backward_time:g} "
            "for the input's gradient.\n  Use less of it, or a longer backward."
        )
    shown = _of_files(args)
    if args.order or not args.file:
        shown += _of_names(args)
    if args.weights_time is not None and not any(_is_split(each.order) for each in shown):
        raise UserError(
            "--weights-time is a part of a split backward, and no order that is shown has one.\n"
            f"  Leave it out, or add --order {DEFERRED}."
        )
    if (args.csv is not None or args.text) and len(shown) > 1:
        flag = "--csv" if args.csv is not None else "--text"
        raise UserError(f"{flag} holds one schedule, and {len(shown)} are named.\n  Leave out all but one of them.")
    _print(args, shown)
    _write(args, shown)
    return 0


def _of_files(args: argparse.Namespace) -> list[Shown]:
    for flag, value in (("--group", args.group), ("--weight-lag", args.weight_lag)):
        if args.file and value is not None and not args.order:
            raise UserError(f"{flag} is of an --order, and a file has its own.\n  Leave it out.")
    return [_of_file(args, path) for path in args.file]


def _of_file(args: argparse.Namespace, path: str) -> Shown:
    """Read a plan with its own sends and receives, or an order, to which they are added."""
    given = read(path)
    shape = shape_of(given, None, None, None, path)
    name = "standard input" if path == "-" else os.path.basename(path)
    order = [[action for action in rank if action.op in COMPUTE] for rank in given]
    is_plan = any(action.op not in COMPUTE for rank in given for action in rank)
    _check_resident(args.resident_chunks, shape)
    try:
        plan = given if is_plan else lower(order, shape, args.resident_chunks, args.breadth_first_hop)
        check(plan, shape, forward_only=all(action.op is Op.F for rank in order for action in rank))
        return Shown(name, order, plan, replay(plan, shape, _costs(args), connections=args.connections))
    except ScheduleError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot run: {reason}\n  bfpp check lists all that is wrong with a plan.") from None


def _check_resident(resident: int | None, shape: PipelineShape) -> None:
    if resident is not None and not 1 <= resident <= shape.num_chunks:
        raise UserError(f"--resident-chunks is {resident}, but a rank has {shape.num_chunks} model chunks.\n"
                        f"  Use 1 to {shape.num_chunks}.")  # fmt: skip


def _of_names(args: argparse.Namespace) -> list[Shown]:
    sizes = {"--pp": args.pp, "--chunks": args.chunks, "--microbatches": args.microbatches}
    missing = ", ".join(flag for flag, size in sizes.items() if size is None)
    if missing:
        raise UserError(f"{missing} is not given.\n  Give all three sizes of the pipeline, or the FILE of an order.")
    shape = PipelineShape(*sizes.values())
    if 2 * shape.num_stages * shape.num_microbatches > MOST_ACTIONS:
        most = f"more than {MOST_ACTIONS} forwards and backwards"
        raise UserError(f"{title(shape)} are {most}.\n  Show a smaller pipeline.")
    _check_resident(args.resident_chunks, shape)
    words = args.order or ["breadth-first"]
    if args.backward == "late":
        words = ["breadth-first-late" if word == "breadth-first" else word for word in words]
    if args.weight_lag is not None and not any(SCHEDULES[word].is_split for word in words):
        raise UserError(f"--weight-lag is of a split backward.\n  Leave it out, or add --order {DEFERRED}.")
    return [_of_name(args, word, shape) for word in dict.fromkeys(words)]


def _of_name(args: argparse.Namespace, word: str, shape: PipelineShape) -> Shown:
    chunks = 1
    if not SCHEDULES[word].chunks:  # those of a rank, in a row, are its one stage
        chunks, shape = shape.num_chunks, replace(shape, num_chunks=1)
    name, order = _order(args, word, shape)
    ours = args.resident_chunks, args.breadth_first_hop
    plan, predicted = predict(name, order, shape, _costs(args, chunks), *ours, args.connections)
    return Shown(name, order, plan, replace(predicted, chunks_per_stage=chunks))


def _order(args: argparse.Namespace, word: str, shape: PipelineShape) -> tuple[str, Schedule]:
    """Return an order and its name, which says of a split backward whether it comes late."""
    if not SCHEDULES[word].is_split:
        return word, order_of(word, shape, args.group)
    is_eager, hop = args.backward == "eager", args.breadth_first_hop
    lags = choose_weight_lags(shape, args.group, is_eager, most=args.weight_lag, hop=hop)  # those of a job
    if is_eager:
        return word, order_of(word, shape, args.group, lags)
    sizes = shape.pp_size, shape.num_chunks, shape.num_microbatches
    late = word_of("breadth-first", *sizes, backward="late", weight_gradients="deferred")
    return late, split_backward(order_of("breadth-first-late", shape, args.group), lags)


def _costs(args: argparse.Namespace, chunks: int = 1) -> Costs:
    """Return the costs of stages of so many chunks."""
    forward, backward, gather, reduction = (
        chunks * time for time in (1.0, args.backward_time, args.gather, args.reduction)
    )
    weights = None if args.weights_time is None else chunks * args.weights_time
    return Costs(forward, backward, weights, args.hop, args.transfer, gather, reduction)


def _is_split(order: Schedule) -> bool:
    """Return whether any backward is split."""
    return any(action.op is Op.W for rank in order for action in rank)


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
    planned = [(each.name, each.predicted) for each in shown]
    times = [f"backward {args.backward_time:g}"]
    if any(_is_split(each.order) for each in shown):
        weights = args.backward_time / 2 if args.weights_time is None else args.weights_time
        times.append(f"of it weights' gradient {weights:g}")
    times += [f"{noun} {getattr(args, flag):g}" for flag, (_, noun) in _TIMES.items() if getattr(args, flag)]
    note = f"Planned, not measured. In forwards of a chunk: {', '.join(times)}."
    write_wanted(
        args,
        csv=lambda: formats.to_csv(shown[0].plan if args.plan else shown[0].order),
        svg=lambda: picture(planned, note=note).svg(),
        html=lambda: page(planned, note),
        trace=lambda: json.dumps(document(planned)) + "\n",
    )
    if args.png is not None:
        picture(planned, note=note).png(args.png, "--png")

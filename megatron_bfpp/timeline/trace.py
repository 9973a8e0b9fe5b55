"""bfpp trace: a measured step beside the planned one, as a picture and a table. Standard library only."""

import argparse
from typing import Any

from ..console.errors import UserError
from ..console.files import write_wanted
from ..schedule import Op
from ..schedule.formats import title
from . import picture as draw
from .measured import Measured, damage_reported, read, steps_of
from .picture import NAMES


def picture(measured: Measured, step: int) -> str:
    """Return an SVG of the planned step above the measured one, on one time axis."""
    named = [("planned", measured.planned()), (f"measured, step {step}", measured)]
    return draw.picture(named, unit="ms", forward=measured.action_time(Op.F) or 1.0).svg()


def table(measured: Measured) -> str:
    """Return a row per rank: what its step was spent on. Padded by hand, as plain ASCII goes through every pipe."""
    planned = measured.planned()
    lines = [f"{'pp_rank':<9}{'busy':>12}{'exposed p2p':>14}{'exposed dp':>13}{'bubble measured':>18}{'predicted':>12}"]
    for rank, spans in enumerate(planned.spans):
        predicted = 1 - sum(span.end - span.start for span in spans) / planned.step_time
        p2p = "unknown" if measured.exposed_p2p is None else f"{measured.exposed_p2p[rank]:.2f} ms"
        lines.append(
            f"{rank:<9}{measured.busy[rank]:>9.2f} ms{p2p:>14}{measured.exposed_dp[rank]:>10.2f} ms"
            f"{measured.bubble_of(rank):>18.1%}{predicted:>12.1%}"
        )
    return "\n".join([*lines, f"{'all':<48}{measured.bubble_fraction:>18.1%}{planned.bubble_fraction:>12.1%}"])


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp trace` to the subcommands."""
    parser = commands.add_parser("trace", help="show what the time of a measured step went to, and draw it")
    parser.add_argument("file", help="trace.json of a run, as --bfpp-trace-steps writes it")
    parser.add_argument("--svg", metavar="PATH", help="write the picture: planned above measured")
    parser.add_argument("--step", type=int, help="which of the traced steps; default: the last")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    document = read(args.file)
    steps = steps_of(document)
    if not steps:
        raise UserError(f"{args.file} holds no step.")
    step = max(steps) if args.step is None else args.step
    if step not in steps:
        known = " to ".join(str(each) for each in sorted({min(steps), max(steps)}))
        raise UserError(f"{args.file} has no step {step}.\n  Use --step {known}.")
    with damage_reported():
        text, drawn = _text(document["otherData"], steps, step), picture(steps[step], step)
    print(text)
    write_wanted(args, svg=lambda: drawn)
    return 0


def _text(about: dict[str, Any], steps: dict[int, Measured], step: int) -> str:
    measured = steps[step]
    times = [(op, measured.action_time(op)) for op in NAMES]
    error = max(next(each for each in about["steps"] if each["step"] == step)["clock_error_us"])
    lines = [
        f"{about['schedule']}: {title(measured.shape)}; step {step}, {measured.step_time:.2f} ms "
        f"from first to last action; clocks agree within {error:.0f} us",
        table(measured),
        f"median: {', '.join(f'{NAMES[op]} {time:.2f} ms' for op, time in times if time is not None)}",
        "predicted: the same order with these medians, equal stages, no network",
    ]
    others = [f"{number}: {each.bubble_fraction:.1%}" for number, each in steps.items() if number != step]
    if others:
        lines.append(f"bubble measured in the other steps: {', '.join(others)}")
    return "\n".join(lines)

"""bfpp: look at a schedule, prove a plan, plan a job, without torch and without Megatron; try a job without its GPUs;
run schedules on an emulated network.

    bfpp show --pp 4 --chunks 2 --microbatches 8 --svg breadth_first.svg
    bfpp show plan.csv --trace plan.json
    bfpp compare ab/*.* --html report.html
    bfpp ab --config configs/quickstart.yaml --output-path ab --dry-run
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
import sys
from typing import NoReturn

from .ab import command as ab
from .bench import command as bench
from .check import command as dry_run
from .compare import command as compare
from .console.errors import UserError, shown
from .console.version import __version__
from .doctor import command as doctor
from .planner import command as plan
from .schedule import Op, ScheduleError, check, formats
from .schedule.plan_file import read, shape_of, title
from .timeline import show, trace


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
    bfpp: argparse.ArgumentParser = _Parser(
        prog="bfpp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    bfpp.add_argument("--version", action="version", version=f"megatron_bfpp {__version__}")
    commands = bfpp.add_subparsers(
        dest="command", required=True, metavar="{show,check,plan,bench,trace,compare,ab,doctor}"
    )

    show.add_command(commands)
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
    ab.add_command(commands)
    plan.add_command(commands)
    bench.add_command(commands)
    trace.add_command(commands)
    doctor.add_command(commands)
    return bfpp


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
    plan = read(path)
    shape = shape_of(plan, args.pp, args.chunks, args.microbatches, path)
    try:
        check(plan, shape, forward_only=not any(action.op is Op.B for rank in plan for action in rank))
    except ScheduleError as error:
        print(f"unsound as {title(shape)}: {error}")
        return 1
    print(f"sound: {title(shape)}, {sum(map(len, plan))} actions, plan {formats.digest(plan)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

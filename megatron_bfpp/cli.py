"""bfpp: see a schedule, prove a plan, plan a job, try it without its GPUs, compare runs, examine a machine.

    bfpp show --pp 4 --chunks 2 --microbatches 8 --svg breadth_first.svg
    bfpp check plan.csv
    bfpp check --config configs/gpt_52b_64_v100.yaml
    bfpp plan configs/gpt_52b.yaml --gpu h100-80 --gpus 64 --global-batch 64
    bfpp bench --plot bench.png
    bfpp trace RUN/trace.json --svg timeline.svg
    bfpp ab --config configs/quickstart.yaml --output-path ab --dry-run
    bfpp compare ab/*.* --html report.html
    bfpp doctor

Exit codes: 0 good, 1 found wrong, 2 bad input, 3 a fault of bfpp itself (a traceback names it), 4 nothing wrong, but a
trial could not run all of its rows (doctor --gpu-trial).
"""

import argparse
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

from .console.errors import UserError, shown
from .console.version import __version__

# Word -> the module whose add_command(commands) adds it; imported only when the word is used, or all are listed.
WORDS = {
    "show": "timeline.show",
    "check": "check.command",
    "plan": "planner.command",
    "bench": "bench.command",
    "ab": "ab.command",
    "trace": "timeline.trace",
    "compare": "compare.command",
    "doctor": "doctor.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name need not be UTF-8, and is printed when it is written
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parsed(words)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"bfpp {args.command}: {shown(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `bfpp show | head`
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        print(f"bfpp {args.command}: this is a fault of megatron_bfpp {__version__}.", file=sys.stderr)
        return 3


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name what is wrong and where the flags are listed, without the list itself."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {shown(message)}\n  {self.prog} --help lists the flags.", file=sys.stderr)
        sys.exit(2)


def _parsed(words: list[str]) -> argparse.Namespace:
    """Parse with the parser of the command that `words` name, or of all commands if they name none."""
    bfpp = _Parser(prog="bfpp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    bfpp.add_argument("--version", action="version", version=f"megatron_bfpp {__version__}")
    commands = bfpp.add_subparsers(dest="command", required=True, metavar="{" + ",".join(WORDS) + "}")
    for word in words[:1] if words and words[0] in WORDS else WORDS:
        import_module(f".{WORDS[word]}", __package__).add_command(commands)
    for word in words[: words.index("--")] if "--" in words else words:
        if word.startswith("--") and word.endswith("=--"):  # argparse before Python 3.13 would drop this -- silently
            bfpp.error(f"argument {word.removesuffix('=--')}: expected one argument")
    return bfpp.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())

"""bfpp: see a schedule, prove a plan, plan a job, try it without its GPUs, compare runs, examine a machine.

    bfpp show --pp 4 --chunks 2 --microbatches 8 --svg breadth_first.svg
    bfpp check plan.csv
    bfpp check configs/gpt_52b_64_v100.yaml
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
import errno
import os
import signal
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

from .console.errors import UserError, shown
from .console.processes import Stopped, stoppable
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
# Word -> its argument that takes what stands behind --, too: argparse ends it with the first flag behind a file.
_BEHIND = {"check": "file", "plan": "model"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name need not be UTF-8, and is printed when it is written
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stdout is None:  # the shell's >&-
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    command = words[0] if words else ""
    try:
        with stoppable():
            args = _parsed(words)
            code = int(args.run(args))
        sys.stdout.flush()
        return code
    except Stopped as stop:
        print(f"bfpp {command}: stopped by {signal.Signals(int(str(stop.code)) - 128).name}.", file=sys.stderr)
        return int(str(stop.code))
    except UserError as error:
        print(f"bfpp {command}: {shown(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `bfpp show | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _fault(command)
        print(f"bfpp {command}: cannot write: {error.strerror}.\n  Make room on the disk.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer would fail again at the end
        return 2
    except Exception:
        return _fault(command)


def _fault(command: str) -> int:
    traceback.print_exc()
    print(f"bfpp {command}: this is a fault of megatron_bfpp {__version__}.", file=sys.stderr)
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
    if words[:1] and words[0] in _BEHIND and "--" in words:
        end = words.index("--")
        args, name = _parse(bfpp, words[:end]), _BEHIND[words[0]]
        setattr(args, name, [*getattr(args, name), *words[end + 1 :]])
        return args
    return _parse(bfpp, words)


def _parse(bfpp: _Parser, words: list[str]) -> argparse.Namespace:
    """Parse; an unknown flag is an error of the command, whose --help lists the flags that it has."""
    args, rest = bfpp.parse_known_args(words)
    if rest:
        bfpp.prog += f" {args.command}"
        bfpp.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


if __name__ == "__main__":
    sys.exit(main())

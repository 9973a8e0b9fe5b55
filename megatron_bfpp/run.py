"""Run a Megatron script, unmodified, with breadth-first available:

torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS]
torchrun ... -m megatron_bfpp.run pretrain_gpt.py --pipeline-schedule breadth-first ...
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable

from .console.errors import UserError, shown

USAGE = "usage: torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS]"
ALONE_S = 1.0  # ten times what torchrun takes to end the ranks of a node


def launch(argv: list[str], main: Callable[[], None]) -> None:
    """enable(), then main() with `argv` as the command line, less our --device. A UserError ends it with exit code 2.

    main is called after Megatron has its new flags, so it is what imports Megatron's scripts.
    """
    try:
        device, rest = _split_device(argv)
        sys.argv = [sys.argv[0], *rest]
        from . import enable

        enable(device=device)
        main()
    except UserError as error:
        # Every rank ends here as a rule, and the first of each node speaks for the others: torchrun ends them before they
        # would. A rank that is refused alone, started with other flags, has that time to say so.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megatron_bfpp: error: {shown(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(ALONE_S)
            first = shown(error).splitlines()[0]
            print(f"megatron_bfpp: rank {os.environ.get('RANK')} is refused: {first}", file=sys.stderr, flush=True)
        sys.exit(2)


def _split_device(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --device, and the arguments without it."""
    device, rest, words = "auto", [], iter(argv)
    for word in words:
        if word == "--device":
            value = next(words, None)
            if value is None:
                raise UserError("--device needs a value.\n  Use --device auto, cuda or cpu.")
            device = value
        elif word.startswith("--device="):
            device = word.removeprefix("--device=")
        else:
            rest.append(word)
    return device, rest


def main(argv: list[str]) -> None:
    """Find the script: the first word that is neither --device nor its value; only what stands before it is ours."""
    position = 0
    while position < len(argv) and argv[position].startswith("--device"):
        position += 1 if "=" in argv[position] else 2
    if position >= len(argv) or argv[position] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        sys.exit(0 if position < len(argv) else 2)
    script = argv[position]

    def run_script() -> None:
        if not os.path.isfile(script):
            raise UserError(f"the script {script} does not exist.\n  {USAGE}")
        sys.argv = [script, *argv[position + 1 :]]
        runpy.run_path(script, run_name="__main__")

    # As `python SCRIPT` does, and before anything of Megatron is imported: in a checkout the checkout's Megatron counts.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    launch(argv[:position], run_script)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run a Megatron script, unmodified, with breadth-first available:

torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS]
torchrun ... -m megatron_bfpp.run pretrain_gpt.py --pipeline-schedule breadth-first ...
"""

import os
import runpy
import sys
import time
from collections.abc import Callable

from .console.errors import UserError, shown

USAGE = "usage: torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS]"
ALONE_S = 1.0  # ten times what torchrun takes to end the ranks of a node


def launch(argv: list[str], main: Callable[[], None]) -> None:
    """Call enable(), then main() with `argv`, less our --device, as the command line. A UserError ends it with code 2.

    main is called after Megatron has its new flags: it imports Megatron's scripts.
    """
    try:
        device, rest = _split_device(argv)
        sys.argv = [sys.argv[0], *rest]
        from . import enable

        enable(device=device)
        main()
    except UserError as error:
        # As a rule every rank ends here, and the first of each node speaks for the others: torchrun ends them before
        # they would print. A rank refused alone, started with other flags, has that time to report it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"megatron_bfpp: error: {shown(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(ALONE_S)
            first = shown(error).splitlines()[0]
            print(f"megatron_bfpp: rank {os.environ.get('RANK')} is refused: {first}", file=sys.stderr, flush=True)
        sys.exit(2)


def _split_device(argv: list[str]) -> tuple[str, list[str]]:
    """Return the value of --device, and the arguments without it."""
    device, rest, words = "auto", [], iter(argv)
    for word in words:
        if word == "--device" or word.startswith("--device="):
            value = word.partition("=")[2] if "=" in word else next(words, None)
            if value is None:
                raise UserError("--device needs a value.\n  Use --device auto, cuda or cpu.")
            device = value
        else:
            rest.append(word)
    return device, rest


def main(argv: list[str]) -> None:
    """Run the script: the first word that is neither --device nor its value. Only what stands before it is ours."""
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

    # As `python SCRIPT` does, and before Megatron is imported: in a checkout the checkout's Megatron counts.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    launch(argv[:position], run_script)


if __name__ == "__main__":
    main(sys.argv[1:])

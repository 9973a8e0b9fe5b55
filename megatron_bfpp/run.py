"""Run a script or module that uses Megatron, unmodified, with breadth-first available:

torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS]
torchrun ... -m megatron_bfpp.run pretrain_gpt.py --pipeline-schedule breadth-first ...
BFPP_PIPELINE_SCHEDULE=breadth-first python -m megatron_bfpp.run -m verl.trainer.main_ppo ...

The variable is for trainers without the flag. It may be that they use Megatron in other processes only: nothing is
imported for them here, and the workers that they start through Ray get what `ray_runtime_env` says.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

from .console.errors import UserError, shown

USAGE = "usage: torchrun ... -m megatron_bfpp.run [--device auto|cuda|cpu] SCRIPT [ARGS], or -m MODULE [ARGS]"
RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"  # Ray's name of a function that ray.init() calls with its runtime_env
SETUP_HOOK = "megatron_bfpp.enable_from_environment"
ALONE_S = 1.0  # ten times what torchrun takes to end the ranks of a node


def launch(argv: list[str], main: Callable[[], None]) -> None:
    """Call enable(), then main() with `argv`, less our --device, as the command line. A UserError ends it with code 2.

    main is called after Megatron has its new flags: it imports Megatron's scripts.
    """
    try:
        device, rest = _split_device(argv)
        sys.argv = [sys.argv[0], *rest]
        if os.environ.get("BFPP_PIPELINE_SCHEDULE"):
            _enable_here_and_on_ray(device)
        else:
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


def _enable_here_and_on_ray(device: str) -> None:
    from . import enable_from_environment

    ours = f"{__package__}.run.{ray_runtime_env.__name__}"
    if os.environ.setdefault(RAY_HOOK, ours) != ours:
        print(
            f"megatron_bfpp: WARNING: {RAY_HOOK} is {os.environ[RAY_HOOK]} already; Ray's workers follow the "
            f"variable only if it calls {ours} too",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    enable_from_environment(device)


def ray_runtime_env(given: dict[str, Any] | None) -> dict[str, Any]:
    """Return a runtime_env of Ray whose workers call enable_from_environment(), with this process's BFPP_... variables.

    For ray.init(runtime_env=...), where Ray's RAY_RUNTIME_ENV_HOOK does not call it. UserError where the workers have a
    setup hook of another kind.
    """
    found = dict(given or {})
    hook = found.setdefault("worker_process_setup_hook", SETUP_HOOK)
    if hook != SETUP_HOOK:
        raise UserError(
            f"the runtime_env of Ray has the worker_process_setup_hook {hook} already, and takes one.\n"
            f"  Call {SETUP_HOOK}() in it, and unset {RAY_HOOK}."
        )
    own = {name: value for name, value in os.environ.items() if name.startswith("BFPP_")}
    found["env_vars"] = own | dict(found.get("env_vars") or {})
    return found


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
    """Run the script, the first word that is neither --device nor its value, or the module behind -m.

    Only what stands before it is ours.
    """
    position = 0
    while position < len(argv) and argv[position].startswith("--device"):
        position += 1 if "=" in argv[position] else 2
    if position >= len(argv) or argv[position] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        sys.exit(0 if position < len(argv) else 2)
    is_module = argv[position] == "-m"
    if is_module and position + 1 == len(argv):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    script, arguments = argv[position + is_module], argv[position + is_module + 1 :]

    def run_script() -> None:
        sys.argv = [script, *arguments]
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        elif not os.path.isfile(script):
            raise UserError(f"the script {script} does not exist.\n  {USAGE}")
        else:
            runpy.run_path(script, run_name="__main__")

    # As `python` does, and before Megatron is imported: in a checkout the checkout's Megatron counts.
    sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.abspath(script)))
    launch(argv[:position], run_script)


if __name__ == "__main__":
    main(sys.argv[1:])

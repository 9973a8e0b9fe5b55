"""bfpp doctor: examine a machine for breadth-first training, and show on it that both schedules compute the same bits.

The first command on a cluster, on a node with its GPUs and in the job's container and environment:
    srun --nodes 1 --ntasks 1 bfpp doctor
It imports neither torch nor Megatron: where one is missing or broken, the table reports it.
"""

import argparse
from typing import Any

from ..console import progress
from ..console.errors import UserError
from ..console.files import check_wanted, write_wanted
from ..console.version import __version__
from . import facts as doctor_facts
from . import trial as doctor_trial
from .line import FAIL, Facts, Line, fail, gpus, ok, section
from .table import judged, summary, table

FORMAT = "megatron_bfpp doctor 1"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp doctor`."""
    parser = commands.add_parser("doctor", help="examine this machine, and train on two of its devices for a moment")
    parser.add_argument("--no-run", action="store_true", help="leave out the training, which takes half a minute")
    about = "ten minutes of jobs on this node's GPUs instead: bits, hangs, times, overlap, memory, a killed rank"
    parser.add_argument("--gpu-trial", action="store_true", help=about)
    parser.add_argument("--json", metavar="PATH", help="write all that was found")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and report; return 0 if nothing fails, else 1; 4 for a GPU trial some rows of which need more GPUs."""
    check_wanted(args, "json")
    if args.gpu_trial:
        if args.no_run:
            raise UserError("--gpu-trial runs jobs, and --no-run none.\n  Leave out one of them.")
        from .gpu_trial import command as gpu_trial

        return gpu_trial.run(args)
    try:
        facts = doctor_facts.gather(lambda part: progress.show(0.0, f"looking at {part}"))
        lines = judged(facts)
        progress.clear()
        print(f"megatron_bfpp {__version__}\n{table(lines)}", flush=True)
        content: dict[str, Any] = {"format": FORMAT, "version": __version__, "facts": facts, "trial": None}
        if not args.no_run:
            last, content["trial"] = _tried(facts, lines)
            lines.append(last)
            print(table([last]))
    finally:
        progress.clear()
    print(summary(lines))
    write_wanted(args, json=lambda: content | {"lines": [line._asdict() for line in lines]})
    return 1 if any(line.status == FAIL for line in lines) else 0


def _tried(facts: Facts, lines: list[Line]) -> tuple[Line, Facts | None]:
    """Make the equality run where the lines allow it; return its line and its numbers."""
    name = "equality run"
    needed = ("Python", "torch", "megatron-core", "numpy", "loopback")
    broken = [line.name for line in lines if line.name in needed and line.status == FAIL]
    if not broken and not section(facts, "megatron").get("training"):
        broken = ["megatron.training"]
    if broken:
        return fail(name, f"not started for want of {' and '.join(broken)}", "see above"), None
    device = "cuda" if len(gpus(facts)) >= doctor_trial.RANKS else "cpu"
    trial = doctor_trial.run_trial(device, _show_step)
    progress.clear()
    where = f"{doctor_trial.RANKS} {'GPUs' if device == 'cuda' else 'processes on the CPU'}"
    what = f"PP 2 x 2 chunks, {doctor_trial.STEPS} steps, {where}, {trial.seconds:.0f} s"
    if not trial.is_equal:
        return fail(name, f"{what}: {trial.reason}", f"the ranks' logs are in {trial.log_folder}"), trial._asdict()
    losses = f"{trial.losses[0]:.6f} to {trial.losses[-1]:.6f}"
    return ok(name, f"{what}: breadth-first computes the bits of interleaved (lm loss {losses})"), trial._asdict()


def _show_step(arm: str, steps: int) -> None:
    arms = list(doctor_trial.ARMS)
    part = (arms.index(arm) + steps / doctor_trial.STEPS) / len(arms)
    progress.show(part, f"training with {arm}: step {steps} of {doctor_trial.STEPS}")

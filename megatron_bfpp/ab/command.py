"""bfpp ab: train with every schedule in turn, on the same devices, data and seed, and compare the runs."""

import argparse
import os
import shlex
import subprocess

from ..console.errors import UserError
from ..console.processes import package_on_path
from ..schedule.names import SCHEDULES
from . import launchers
from .job import ARMS, Job
from .rounds import Rounds, say
from .settings import ABSettings, Settings

_LOCAL_ARMS = "interleaved interleaved-grouped breadth-first"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp ab`."""
    parser = commands.add_parser("ab", help="train with every schedule in turn, and compare the runs", description=(
        "Every arm in every round on the same devices, with the same data and seed, then bfpp compare. Settings are "
        "flags, or environment variables of the same names: --output-path or OUTPUT_PATH. Started again, it goes on "
        "where it was stopped. Exit code 0: all runs finished with the same losses. 1: not so. 2: bad input."
    ))  # fmt: skip
    ABSettings.add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the A/B and return the exit code of its report."""
    settings = ABSettings.read(args, os.environ)
    settings.check()
    launcher = launchers.choose(args.launcher, settings, os.environ, args.dry_run)
    is_local = launcher.srun is None
    words = (settings.arms or (_LOCAL_ARMS if is_local else f"{_LOCAL_ARMS} breadth-first-sharded")).split()
    for word in words:
        if word not in ARMS:
            raise UserError(f"ARMS: {word} does not exist; use {' '.join(ARMS)}")
        if words.count(word) > 1:
            raise UserError(f"ARMS names {word} twice; ROUNDS is how often each arm runs")
    job = Job.read(settings, launcher, with_chunks=any(SCHEDULES[word].chunks for word in words))
    rounds = Rounds(settings, launcher, {word: job.arm(word) for word in words}, environment_of(settings, "ab"),
                    settings.steps or (40 if is_local else 120), settings.rounds, args.dry_run)  # fmt: skip
    if not args.dry_run:
        make_output(settings)
    rounds.run()
    return _report(rounds)


def environment_of(settings: Settings, job_type: str) -> dict[str, str]:
    """Return the environment of all commands: with this package, and the names of W&B's groups."""
    names = {"WANDB_RUN_GROUP": settings.output.name, "WANDB_JOB_TYPE": job_type}
    return {**names, **os.environ, "PYTHONPATH": package_on_path()}


def make_output(settings: Settings) -> None:
    """Make OUTPUT_PATH. UserError where that is impossible."""
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_PATH={settings.output_path} cannot be made: {error.strerror}") from None


def _report(rounds: Rounds) -> int:
    """Compare all runs where they ran; return the exit code of bfpp compare."""
    settings, output = rounds.settings, rounds.settings.output
    words = [settings.python, "-m", "megatron_bfpp.cli", "compare", *rounds.folders()]
    for kind, name in (("html", "html"), ("markdown", "md"), ("json", "json")):
        words += [f"--{kind}", str(output / f"report.{name}")]
    for flag, value in (("--warmup", settings.warmup), ("--loss-tolerance", settings.loss_tolerance),
                        ("--wandb-project", settings.wandb_project)):  # fmt: skip
        words += [flag, value] if value else []
    command = rounds.launcher.once(words)
    if rounds.dry_run:
        say(f"would run: {shlex.join(command)}")
        return 0
    environment = dict(rounds.environment) | ({"WANDB_DIR": str(output)} if settings.wandb_project else {})
    code = subprocess.run(command, check=False, env=environment).returncode
    if settings.wandb_project and os.environ.get("WANDB_MODE") == "offline":
        say(f"upload with: wandb sync {output}/wandb/wandb/offline-run-* {output}/wandb/offline-run-*")
    return code

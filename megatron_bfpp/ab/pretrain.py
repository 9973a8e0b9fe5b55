"""python -m megatron_bfpp.ab.pretrain: train the model of CONFIG with checkpoints, from the last one on.

Settings are flags, or environment variables of the same names: --output-path or OUTPUT_PATH.
"""

import argparse
import os
import shlex
import sys

from ..console.errors import UserError, shown
from ..console.processes import Ranks, stoppable
from . import launchers
from .command import environment_of, make_output
from .job import Job, logging_flags
from .settings import TrainingSettings


def main() -> int:
    """Start the training, with its output on standard output; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_bfpp.ab.pretrain", description=__doc__)
    TrainingSettings.add_flags(parser)
    args = parser.parse_args()
    try:
        settings = TrainingSettings.read(args, os.environ)
        settings.check()
        launcher = launchers.choose(args.launcher, settings, os.environ, args.dry_run)
        command = Job.read(settings, launcher).words(settings, launcher, _flags(settings), {})
        if args.dry_run:
            print(f"would run: {shlex.join(command)}")
            return 0
        make_output(settings)
    except UserError as error:
        print(f"pretrain: {shown(error)}", file=sys.stderr)
        return 2
    with stoppable(), Ranks(grace_s=60) as ranks:
        ranks.start(command, None, environment_of(settings, "pretrain"))
        return ranks.wait()[0] or 0


def _flags(settings: TrainingSettings) -> list[str]:
    output, checkpoints = settings.output, str(settings.output / "checkpoints")
    flags = ["--save", checkpoints, "--load", checkpoints, "--save-interval", str(settings.save_interval)]
    flags += ["--bfpp-run-dir", str(output / "run"), *logging_flags(settings, output.name, output)]
    flags += ["--train-iters", str(settings.steps)] if settings.steps else []
    return flags + (["--pipeline-schedule", settings.pipeline_schedule] if settings.pipeline_schedule else [])


if __name__ == "__main__":
    sys.exit(main())

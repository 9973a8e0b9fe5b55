"""enable() and disable(): the seams that they apply, and the dispatch at the schedule's seam."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ..console.errors import UserError
from . import process, relied_on, seams
from .cpu import mode
from .flags.settings import add_flags, schedule_in_environment, settings_of
from .imports import after_import
from .process import say
from .reliability import orphans, watch
from .relied_on.cpu import INITIALIZE_BRIDGE
from .relied_on.step import INITIALIZE, ORDER, SCHEDULE
from .relied_on.training import ADD_ARGUMENTS, RESULTS_QUEUE, TRAIN_STEP, VALIDATE_ARGS, VALIDATE_YAML
from .validation import Report, Validation, parts_of, report_on_first_rank

FIRST_TORCH = (2, 9)  # the first that is tested; a newer one than the last that is tested runs


def enable(pipeline_schedule: str | None = None, device: str = "auto") -> str:
    """Apply the seams and return the device in use, "cuda" or "cpu". Idempotent. See megatron_bfpp.enable."""
    schedule_in_environment()
    relied_on.check_release()
    check_torch()
    device, reason = mode.choose_device(device)
    if pipeline_schedule is not None:
        process.choose(pipeline_schedule)
    _check_seams(device)
    if device == "cpu" and not mode.is_cpu_enabled():
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron_bfpp: running on CPU over gloo: {reason}", flush=True)
        mode.enable_cpu()
        after_import(INITIALIZE_BRIDGE.module, mode.apply_to_bridge)
    mode.skip_compile_without_makefile()
    if process.explicit_schedule != "1f1b":
        seams.apply(SCHEDULE, _dispatch)
        seams.apply(ORDER, _order)
    seams.apply(INITIALIZE, watch.meeting)
    # A trainer may use Megatron-Core alone, and need not wait for megatron.training then.
    after_import("megatron.training", partial(_apply_to_training, device, report_on_first_rank))
    return device


def enable_for_dry_run(report: Report) -> None:
    """Validate command lines as on a cluster with GPUs, and build models, on a machine that has none.

    report: takes what the plugin would print about the command line on rank 0.
    """
    relied_on.check_release()
    check_torch()
    if importlib.util.find_spec("megatron.training") is None:
        raise UserError(f"megatron.training is not installed.\n  {relied_on.INSTALL}.")
    _check_seams("cpu")
    mode.enable_cpu()
    mode.skip_compile_without_makefile()
    seams.apply(INITIALIZE, watch.meeting)
    _apply_to_training("cuda", report)


def _check_seams(device: str) -> None:
    """Look at the seams that are applied here, and at those of a schedule that is chosen before the command line.

    Those of flags are looked at when Megatron validates its command line.
    """
    if process.explicit_schedule != "1f1b":
        relied_on.check(relied_on.STEP)
    if device == "cpu" and not mode.is_cpu_enabled():  # once it is, what stands there is ours
        relied_on.check(relied_on.CPU)
    if (process.explicit_schedule or schedule_in_environment()) != "breadth-first":
        return
    args = process.megatron_args()
    if args is None:  # it may never be parsed, or not by Megatron
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_flags(parser, default=None)
        args = parser.parse_known_args()[0]
    relied_on.check(*parts_of(settings_of(args, process.explicit_schedule)))
    for line in relied_on.strange_release():
        if int(os.environ.get("RANK", "0")) == 0:
            say(line)


def _apply_to_training(device: str, report: Report) -> None:
    relied_on.check(relied_on.COMMAND_LINE, relied_on.PLACEMENT)
    import megatron.training.training  # noqa: F401 - binds by name what is replaced here

    def with_flags(add_arguments: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parser = add_arguments(*args, **kwargs)
        add_flags(parser, default=process.explicit_schedule or schedule_in_environment() or "1f1b")
        return parser

    def leave_alone() -> None:
        for seam in (SCHEDULE, ORDER, TRAIN_STEP, RESULTS_QUEUE):
            seams.undo(seam)

    if mode.is_cpu_enabled():
        mode.apply_to_training()
    seams.apply(ADD_ARGUMENTS, with_flags)
    seams.apply(TRAIN_STEP, watch.stepping)
    seams.apply(RESULTS_QUEUE, orphans.ending)
    validation = Validation(device, leave_alone, report)
    seams.apply(VALIDATE_ARGS, validation.of_args)
    seams.apply(VALIDATE_YAML, validation.of_yaml)


def disable() -> None:
    """Undo every change to Megatron and torch, the CPU mode and the watchdog included."""
    seams.undo_all()
    relied_on.forget()


def check_torch() -> None:
    """Raise UserError for a torch that is too old."""
    from torch import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < FIRST_TORCH:
        first = ".".join(map(str, FIRST_TORCH))
        raise UserError(f"torch {version} is not supported: megatron_bfpp works with {first} and newer.")


def _dispatch(original: Callable[..., Any], **call: Any) -> Any:
    """Run the chosen schedule in place of Megatron's interleaved one."""
    from .step import forward_backward

    settings = process.settings()
    if settings.schedule == "1f1b":
        return original(**call)
    relied_on.check(*parts_of(settings))  # as a rule long done
    try:
        if settings.engine == "megatron":
            return forward_backward.run_megatron(settings, original, **call)
        return forward_backward.run(settings, **call)
    except Exception:
        process.ACTIVITY.fail()  # whoever catches it may do anything now, for as long as it likes
        raise


def _order(
    original: Callable[..., list[tuple[int, int]]],
    num_microbatches: int, num_model_chunks: int, microbatch_group_size_per_vp_stage: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Return the micro-batch and the chunk of each forward of a rank: to verl, in the order of the chosen schedule.

    verl sorts by it what it records in passes without backwards, which run in one group, whatever
    --breadth-first-group-size is. Megatron's own schedule, and whoever else asks, gets Megatron's answer.
    """
    caller = sys._getframe(2).f_globals.get("__name__", "")  # behind the replacement of the seam
    is_verls = caller.partition(".")[0] == "verl" and process.settings().schedule != "1f1b"
    group = num_microbatches if is_verls else microbatch_group_size_per_vp_stage
    return original(num_microbatches, num_model_chunks, group)

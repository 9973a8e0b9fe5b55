"""enable() and disable(): the seams that they apply, and the dispatch at the schedule's seam."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..console.errors import UserError
from . import seams
from .cpu import mode
from .flags.settings import SCHEDULES, Settings, add_flags, settings_of
from .process import megatron_args
from .reliability import orphans, watch
from .seams import Seam
from .validation import Report, Validation, report_on_first_rank

SUPPORTED = ((0, 17), (0, 19))  # first and last release of megatron-core with megatron.training that is tested
FIRST_TORCH = (2, 9)  # the first that is tested; a newer one than the last that is tested runs

SCHEDULE = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "forward_backward_pipelining_with_interleaving",
    ("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size",
     "decoder_seq_length", "forward_only", "collect_non_loss_data", "first_val_step", "adjust_tensor_shapes_fn",
     "p2p_communicator", "pg_collection", "force_all_reduce"),
)  # fmt: skip
ADD_ARGUMENTS = Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",))
VALIDATE_ARGS = Seam("megatron.training.arguments", "validate_args", ("args", "defaults"))
VALIDATE_YAML = Seam("megatron.training.yaml_arguments", "validate_yaml", ("args", "defaults"))


def enable(pipeline_schedule: str | None = None, device: str = "auto") -> str:
    """Apply the seams and return the device in use, "cuda" or "cpu". Idempotent. See megatron_bfpp.enable."""
    if pipeline_schedule is not None and pipeline_schedule not in SCHEDULES:
        raise UserError(f"pipeline_schedule={pipeline_schedule!r} does not exist; use {' or '.join(SCHEDULES)}")
    check_version()
    check_torch()
    device, reason = mode.choose_device(device)
    if device == "cpu" and not mode.is_cpu_enabled():
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron_bfpp: running on CPU over gloo: {reason}", flush=True)
        mode.enable_cpu()
    mode.skip_compile_without_makefile()
    if pipeline_schedule != "1f1b":
        seams.apply(SCHEDULE, partial(_dispatch, pipeline_schedule))
    # With an explicit schedule the code may use Megatron-Core alone, whose users need not wait for megatron.training.
    wanted = pipeline_schedule is None or "megatron.training" in sys.modules
    if wanted and importlib.util.find_spec("megatron.training") is not None:
        _apply_to_training(pipeline_schedule, device, report_on_first_rank)
    return device


def enable_for_dry_run(report: Report) -> None:
    """Validate command lines as on a cluster with GPUs, and build models, on a machine that has none.

    report: takes what the plugin would print about the command line on rank 0.
    """
    check_version()
    check_torch()
    if importlib.util.find_spec("megatron.training") is None:
        raise UserError("megatron.training is not installed.\n  pip install 'megatron-core>=0.17,<0.20'.")
    mode.enable_cpu()
    mode.skip_compile_without_makefile()
    _apply_to_training(None, "cuda", report)


def _apply_to_training(explicit: str | None, device: str, report: Report) -> None:
    import megatron.training.training  # noqa: F401 - binds by name what is replaced here

    def with_flags(add_arguments: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parser = add_arguments(*args, **kwargs)
        add_flags(parser, default=explicit or "1f1b")
        return parser

    def leave_alone() -> None:
        for seam in (SCHEDULE, watch.TRAIN_STEP, watch.RESULTS_QUEUE):
            seams.undo(seam)

    seams.apply(ADD_ARGUMENTS, with_flags)
    seams.apply(watch.INITIALIZE, watch.meeting)
    seams.apply(watch.TRAIN_STEP, watch.stepping)
    seams.apply(watch.RESULTS_QUEUE, orphans.ending)
    validation = Validation(explicit, device, leave_alone, report)
    seams.apply(VALIDATE_ARGS, validation.of_args)
    seams.apply(VALIDATE_YAML, validation.of_yaml)


def disable() -> None:
    """Undo every change to Megatron and torch, the CPU mode and the watchdog included."""
    seams.undo_all()


def check_version() -> None:
    """Raise UserError for a Megatron outside the tested releases."""
    if importlib.util.find_spec("megatron.core") is None:
        raise UserError(
            "megatron.core is not installed.\n"
            "  pip install 'megatron-core>=0.17,<0.20', or run from a Megatron-LM checkout."
        )
    from megatron.core.package_info import __version__ as version

    release = tuple(int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= release <= SUPPORTED[1]:
        first, last = (".".join(map(str, end)) for end in SUPPORTED)
        raise UserError(f"megatron-core {version} is not supported: megatron_bfpp works with {first} to {last}.")


def check_torch() -> None:
    """Raise UserError for a torch that is too old."""
    from torch import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < FIRST_TORCH:
        first = ".".join(map(str, FIRST_TORCH))
        raise UserError(f"torch {version} is not supported: megatron_bfpp works with {first} and newer.")


def _dispatch(explicit: str | None, original: Callable[..., Any], **call: Any) -> Any:
    """Run the chosen schedule in place of Megatron's interleaved one: enable()'s, else that of the command line."""
    from .step import forward_backward

    args = megatron_args()
    settings = Settings(schedule="1f1b") if args is None else settings_of(args)
    if explicit is not None:
        settings = replace(settings, schedule=explicit)
    if settings.schedule == "1f1b":
        return original(**call)
    if settings.engine == "megatron":
        return forward_backward.run_megatron(settings, original, **call)
    return forward_backward.run(settings, **call)

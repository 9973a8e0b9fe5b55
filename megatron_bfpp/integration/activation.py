"""enable() and disable(): the seams that they apply, and the dispatch at the schedule's seam."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from ..console.errors import UserError
from . import seams
from .flags.settings import SCHEDULES, Settings, add_flags, settings_of
from .process import megatron_args
from .seams import Seam
from .validation import Report, report_on_first_rank, validating, validating_yaml

SUPPORTED = ((0, 17), (0, 19))  # first and last release of megatron-core with megatron.training that is tested

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
    from .cpu import mode

    device, reason = mode.choose_device(device)
    if device == "cpu" and not mode.is_cpu_enabled():
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron_bfpp: running on CPU over gloo: {reason}", flush=True)
        mode.enable_cpu()
    mode.skip_compile_without_makefile()
    if pipeline_schedule != "1f1b":
        seams.apply(SCHEDULE, partial(_dispatching, pipeline_schedule))
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
    if importlib.util.find_spec("megatron.training") is None:
        raise UserError("megatron.training is not installed.\n  pip install 'megatron-core>=0.17,<0.20'.")
    from .cpu import mode

    mode.enable_cpu()
    mode.skip_compile_without_makefile()
    _apply_to_training(None, "cuda", report)


def _apply_to_training(explicit: str | None, device: str, report: Report) -> None:
    import megatron.training.training  # noqa: F401 - binds by name what is replaced here

    from .reliability import orphans, watch

    def with_flags(add_arguments: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(parser: Any, *args: Any, **kwargs: Any) -> Any:
            parser = add_arguments(parser, *args, **kwargs)
            add_flags(parser, default=explicit or "1f1b")
            return parser

        return wrapper

    def leave_alone() -> None:
        for seam in (SCHEDULE, watch.TRAIN_STEP, watch.RESULTS_QUEUE):
            seams.undo(seam)

    seams.apply(ADD_ARGUMENTS, with_flags)
    seams.apply(watch.INITIALIZE, watch.meeting)
    seams.apply(watch.TRAIN_STEP, watch.stepping)
    seams.apply(watch.RESULTS_QUEUE, orphans.ending)
    seams.apply(VALIDATE_ARGS, lambda validate: validating(validate, explicit, device, leave_alone, report))
    seams.apply(VALIDATE_YAML, lambda validate: validating_yaml(validate, explicit, leave_alone, report))


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


def _dispatching(explicit: str | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of Megatron's interleaved schedule, which runs the chosen one."""

    @wraps(original)  # tools that look at the schedule see Megatron's signature
    def dispatch(**call: Any) -> Any:
        from .step import forward_backward

        settings = _settings(explicit)
        if settings.schedule == "1f1b":
            return original(**call)
        if settings.engine == "megatron":
            return forward_backward.run_megatron(settings, original, **call)
        return forward_backward.run(settings, **call)

    return dispatch


def _settings(explicit: str | None) -> Settings:
    """Return enable()'s explicit choice, else the command line's. Looking it up costs nothing beside a step."""
    args = megatron_args()
    if args is None:
        return Settings(schedule=explicit or "1f1b")
    settings = settings_of(args)
    return settings if explicit is None else replace(settings, schedule=explicit)

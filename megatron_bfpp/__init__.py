"""Breadth-first pipeline parallelism (Lamy-Poirier, arXiv 2211.05953) for Megatron-LM and Megatron-Core."""

import argparse

from .console.version import __version__

__all__ = ["__version__", "add_arguments", "disable", "enable", "enable_from_environment"]


def enable(pipeline_schedule: str | None = None, device: str = "auto") -> str:
    """Add breadth-first to Megatron, in a script, before Megatron parses its arguments. Idempotent.

    pipeline_schedule: "breadth-first" or "1f1b" decides here, for code that uses Megatron-Core without
        megatron.training: get_forward_backward_func then returns the breadth-first function wherever it would return
        the interleaved one. None lets the flag --pipeline-schedule decide, and without it the environment variable
        BFPP_PIPELINE_SCHEDULE.
    device: "auto" is the environment variable BFPP_DEVICE, else CUDA where every rank of the node has a GPU of its own,
        the CPU where there is no NVIDIA driver, and a UserError elsewhere; "cuda"; "cpu".

    Returns "cuda" or "cpu". Raises UserError for what the user must change.
    """
    from .integration.activation import enable

    return enable(pipeline_schedule, device)


def enable_from_environment(device: str = "auto") -> None:
    """Call enable() as soon as this process has imported Megatron's schedules, if BFPP_PIPELINE_SCHEDULE is set.

    Imports neither torch nor Megatron: a process that never touches them, such as a worker of Ray that generates, goes
    on without. UserError for a schedule that does not exist; what enable() raises, the import of Megatron raises.
    """
    from .integration.flags.settings import schedule_in_environment
    from .integration.imports import after_import

    if schedule_in_environment() is not None:
        after_import("megatron.core.pipeline_parallel.schedules", lambda: enable(device=device))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to the parser of a fork of Megatron (see patches/) and return it; else `enable` adds them.

    --pipeline-schedule is None where neither it nor BFPP_PIPELINE_SCHEDULE is given, so that a fork can leave the
    plugin alone.
    """
    from .integration.flags.settings import add_flags, schedule_in_environment

    add_flags(parser, default=schedule_in_environment())
    return parser


def disable() -> None:
    """Undo everything that `enable` did."""
    from .integration.activation import disable

    disable()

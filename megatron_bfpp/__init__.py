"""Breadth-first pipeline parallelism (Lamy-Poirier, arXiv 2211.05953) for Megatron-LM and Megatron-Core."""

import argparse

from .console.version import __version__

__all__ = ["__version__", "add_arguments", "disable", "enable"]


def enable(pipeline_schedule: str | None = None, device: str = "auto") -> str:
    """Add breadth-first to Megatron, in a script, before Megatron parses its arguments. Idempotent.

    pipeline_schedule: None lets the flag --pipeline-schedule decide. "breadth-first" or "1f1b" decides here, for code
        that uses Megatron-Core without megatron.training: get_forward_backward_func then returns the breadth-first
        function wherever it would return the interleaved one.
    device: "auto" is CUDA where every rank of the node has a GPU of its own, the CPU where there is no NVIDIA driver,
        and a UserError elsewhere; "cuda"; "cpu".

    Returns "cuda" or "cpu". Raises UserError for what the user must change.
    """
    from .integration.activation import enable

    return enable(pipeline_schedule, device)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to the parser of a fork of Megatron (see patches/) and return it; else `enable` adds them.

    --pipeline-schedule is None where it is not given, so that a fork can leave the plugin alone.
    """
    from .integration.flags.settings import add_flags

    add_flags(parser, default=None)
    return parser


def disable() -> None:
    """Undo everything that `enable` did."""
    from .integration.activation import disable

    disable()

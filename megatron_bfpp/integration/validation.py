"""Megatron's command line with the plugin's flags: what is refused, what is set, what is told. Before any model is built."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from ..console.version import __version__
from .flags import fully_sharded
from .flags.arguments import refuse
from .flags.batches import few_microbatches
from .flags.placement import place
from .flags.settings import Settings, add_flags, settings_of
from .flags.stages import check_placement
from .observe.apply import observe
from .step import fully_sharded_seams


def validating(
    validate: Callable[..., Any], explicit: str | None, device: str, on_1f1b: Callable[[], None]
) -> Callable[..., Any]:
    """Wrap Megatron's validate_args.

    explicit: what enable() was called with, before any flag. device: "cuda" or "cpu". on_1f1b: leave Megatron alone.
    """

    def wrapper(args: Any, *more: Any, **kwargs: Any) -> Any:
        if explicit is not None:
            args.pipeline_schedule = explicit
        settings = settings_of(args)
        lines = []
        is_breadth_first = settings.schedule != "1f1b"
        if is_breadth_first:
            refuse(args, settings)
        else:
            fully_sharded.refuse_under_1f1b(args)
        if device == "cpu":
            from .cpu.arguments import cpu_arguments

            lines += [f"on a CPU: {line}" for line in cpu_arguments(args)]
        if is_breadth_first:
            lines += place(args)
        else:
            on_1f1b()
            lines.append("1f1b: Megatron's own schedule, untouched")
            if settings.debug_p2p:
                lines.append("WARNING: --bfpp-debug-p2p has no effect under 1f1b, whose messages Megatron sends")
        lines += observe(args)
        is_sharded = is_breadth_first and getattr(args, "use_torch_fsdp2", False)
        with fully_sharded_seams.pipeline_ranks_allowed(validate) if is_sharded else nullcontext():
            validated = validate(args, *more, **kwargs)
        if is_breadth_first:
            lines += _validated(args, settings)
        _tell(args, lines)
        return validated

    return wrapper


def validating_yaml(
    validate: Callable[..., Any], explicit: str | None, on_1f1b: Callable[[], None]
) -> Callable[..., Any]:
    """Wrap Megatron's validate_yaml: --yaml-cfg throws the command line away, the plugin's flags with it.

    They are read from the YAML file, then from the command line. The number of chunks is not chosen here: the file is
    Megatron's own nested format, and is checked after Megatron has read it.
    """

    def wrapper(args: Any, *more: Any, **kwargs: Any) -> Any:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_flags(parser, default="1f1b")
        for name, value in vars(parser.parse_known_args()[0]).items():
            if not hasattr(args, name):
                setattr(args, name, value)
        if explicit is not None:
            args.pipeline_schedule = explicit
        settings = settings_of(args)
        lines = observe(args)
        validated = validate(args, *more, **kwargs)
        if settings.schedule == "1f1b":
            fully_sharded.refuse_under_1f1b(validated)
            on_1f1b()
        else:
            refuse(validated, settings)
            lines += _validated(validated, settings)
        _tell(validated, lines)
        return validated

    return wrapper


def _validated(args: Any, settings: Settings) -> list[str]:
    """What is checked and told when Megatron has completed the arguments, and no model is built yet."""
    if getattr(args, "use_torch_fsdp2", False):
        fully_sharded_seams.apply_to_checkpoints()
    lines = [check_placement(args), *few_microbatches(args)]
    fully_sharded.check_resident_chunks(args, settings)
    if getattr(args, "microbatch_group_size_per_vp_stage", None) is not None:
        lines.append(
            "WARNING: --microbatch-group-size-per-virtual-pipeline-stage belongs to 1f1b and has no effect; "
            "see --breadth-first-group-size"
        )
    return lines


def _tell(args: Any, lines: list[str]) -> None:
    if args.rank == 0:
        for line in lines:
            print(f"megatron_bfpp {__version__}: {line}", flush=True)

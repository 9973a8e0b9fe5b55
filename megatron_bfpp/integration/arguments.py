"""Megatron's command line with the plugin's flags: what is refused, what is set, what is told. Before any model is built."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..errors import UserError
from . import placement
from .settings import Settings, add_flags, settings_of

# argument, flag, why. Each is tied to another schedule by its nature, or untested with this one.
_REFUSED = (
    ("overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm",
     "it pairs forwards with backwards as 1F1B does"),
    ("delay_wgrad_compute", "--delay-wgrad-compute", "it splits the backward as the combined 1F1B schedule does"),
    ("hybrid_context_parallel", "--hybrid-context-parallel", "Megatron has it without pipeline ranks only"),
    ("use_megatron_fsdp", "--use-megatron-fsdp", "Megatron-FSDP fails with pipeline ranks"),
    ("fine_grained_activation_offloading", "--fine-grained-activation-offloading",
     "its order of chunks has not been tested here"),
    ("external_cuda_graph", "--external-cuda-graph", "graphs are captured in 1F1B's order"),
    ("enable_cuda_graph", "--enable-cuda-graph", "graphs are captured in 1F1B's order"),
)  # fmt: skip


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
        if device == "cpu":
            from .cpu import cpu_arguments

            lines += [f"on a CPU: {line}" for line in cpu_arguments(args)]
        if settings.schedule == "1f1b":
            on_1f1b()
            lines.append("1f1b: Megatron's own schedule, untouched")
        else:
            refuse(args, settings)
            lines += _place(args)
            lines += _warnings(args, settings)
        validated = validate(args, *more, **kwargs)
        if settings.schedule != "1f1b":
            _check_placed(args)
        if args.rank == 0:
            for line in lines:
                print(f"megatron_bfpp {__version__}: {line}", flush=True)
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
        validated = validate(args, *more, **kwargs)
        if settings.schedule == "1f1b":
            on_1f1b()
        else:
            refuse(validated, settings)
            _check_placed(validated)
        return validated

    return wrapper


def refuse(args: Any, settings: Settings) -> None:
    """Raise UserError for what breadth-first cannot do, before anything is built."""
    if args.pipeline_model_parallel_size < 2:
        raise UserError(
            f"--pipeline-schedule breadth-first needs pipeline ranks, but --pipeline-model-parallel-size is "
            f"{args.pipeline_model_parallel_size}.\n"
            "  Use --pipeline-model-parallel-size 2 or more, or --pipeline-schedule 1f1b."
        )
    for name, flag, why in _REFUSED:
        if getattr(args, name, None):
            _refuse(flag, why)
    if getattr(args, "cuda_graph_impl", None) not in (None, "none"):
        _refuse(f"--cuda-graph-impl {args.cuda_graph_impl}", "graphs are captured in 1F1B's order")
    if settings.engine == "megatron" and settings.group_size is not None:
        _refuse("--breadth-first-engine megatron", "it has one group, all micro-batches: see --breadth-first-group-size")
    _check_data(args)


def _refuse(flag: str, why: str) -> None:
    raise UserError(
        f"{flag} does not work with --pipeline-schedule breadth-first: {why}.\n"
        f"  Leave out {flag.split()[0]}, or use --pipeline-schedule 1f1b."
    )


def _check_data(args: Any) -> None:
    """Data files that are not there; Megatron would find out after the model is built."""
    if getattr(args, "mock_data", False):
        return
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for prefix in getattr(args, name, None) or []:
            if _is_number(prefix) or "://" in prefix:  # a weight of the blend; an object store
                continue
            for ending in (".idx", ".bin"):
                if not os.path.exists(prefix + ending):
                    flag = "--" + name.replace("_", "-")
                    raise UserError(
                        f"{flag} {prefix}: the file {prefix}{ending} does not exist.\n"
                        f"  Give the path without its ending; both {prefix}.idx and {prefix}.bin must be there."
                    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _place(args: Any) -> list[str]:
    """Choose the number of chunks where the command line has none, and set what Megatron needs for it."""
    if placement.has_chunks(args):
        if getattr(args, "num_virtual_stages_per_pipeline_rank", None) == 1:
            raise UserError(
                "--pipeline-schedule breadth-first needs at least 2 model chunks per rank, but "
                "--num-virtual-stages-per-pipeline-rank is 1.\n"
                "  Use 2 or more, or leave the flag out: the plugin chooses."
            )
        return []
    chunks, why = placement.choose_num_chunks(args)
    args.num_virtual_stages_per_pipeline_rank = chunks
    return [f"chose --num-virtual-stages-per-pipeline-rank {chunks}: {why}"]


def _check_placed(args: Any) -> None:
    """Megatron's own validation is over: with fewer than 2 chunks it would run another schedule, in silence."""
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None)
    if chunks is None or chunks < 2:
        raise UserError(
            "--pipeline-schedule breadth-first needs at least 2 model chunks per rank, but the layers are split into "
            f"{chunks or 1}.\n  Use --num-virtual-stages-per-pipeline-rank 2 or more, or a --pipeline-model-parallel-layout "
            f"with {2 * args.pipeline_model_parallel_size} or more stages."
        )


def _warnings(args: Any, settings: Settings) -> list[str]:
    lines = []
    pp_size, microbatches = args.pipeline_model_parallel_size, placement.num_microbatches(args)
    if microbatches < pp_size:
        lines.append(
            f"WARNING: {microbatches} micro-batches for {pp_size} pipeline ranks leave ranks idle; "
            f"raise --global-batch-size to {args.global_batch_size * -(-pp_size // microbatches)} to fill the pipeline"
            if args.global_batch_size
            else f"WARNING: --global-batch-size is not given: 1 micro-batch for {pp_size} pipeline ranks"
        )
    if getattr(args, "microbatch_group_size_per_vp_stage", None) is not None:
        lines.append(
            "WARNING: --microbatch-group-size-per-virtual-pipeline-stage belongs to 1f1b and has no effect; "
            "see --breadth-first-group-size"
        )
    return lines

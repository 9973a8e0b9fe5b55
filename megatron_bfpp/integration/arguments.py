"""Megatron's command line with the plugin's flags: what is refused, what is set, what is told. Before any model is built."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .. import __version__
from ..errors import UserError
from . import fully_sharded, fully_sharded_seams
from .batches import few_microbatches
from .observe import observe
from .placed import check_placement
from .placement import place
from .settings import Settings, add_flags, settings_of, timeout_of

_ONLY_1F1B = "use --pipeline-schedule 1f1b"
_TE_GRAPHS = "Transformer Engine's graphs are captured in 1F1B's order"
_LOCAL_GRAPHS = "graphs share buffers in the order of the first step, and breadth-first's has not run on a GPU yet"
# argument, flag, why it does not work with this schedule, what to do instead of leaving it out.
_REFUSED = (
    ("overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm",
     "it runs forwards and backwards in pairs, as only 1F1B has them", _ONLY_1F1B),
    ("delay_wgrad_compute", "--delay-wgrad-compute",
     "Megatron takes it only with --overlap-moe-expert-parallel-comm, which needs the pairs of 1F1B", _ONLY_1F1B),
    ("hybrid_context_parallel", "--hybrid-context-parallel", "Megatron has it without pipeline ranks only",
     "use --context-parallel-size"),
    ("use_megatron_fsdp", "--use-megatron-fsdp", "Megatron-FSDP cannot be built with pipeline ranks",
     "use --use-torch-fsdp2"),
    ("external_cuda_graph", "--external-cuda-graph", _TE_GRAPHS, _ONLY_1F1B),
    ("enable_cuda_graph", "--enable-cuda-graph", _LOCAL_GRAPHS, _ONLY_1F1B),
)  # fmt: skip
_GRAPHS = {
    "transformer_engine": _TE_GRAPHS,
    "local": _LOCAL_GRAPHS,
    "full_iteration": "a graph of a whole step with its messages has not run on a GPU yet",
}


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
            from .cpu import cpu_arguments

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


def refuse(args: Any, settings: Settings) -> None:
    """Raise UserError for what breadth-first cannot do, before anything is built."""
    if args.pipeline_model_parallel_size < 2:
        raise UserError(
            f"--pipeline-schedule breadth-first needs pipeline ranks, but --pipeline-model-parallel-size is "
            f"{args.pipeline_model_parallel_size}.\n"
            "  Use --pipeline-model-parallel-size 2 or more, or --pipeline-schedule 1f1b."
        )
    for name, flag, why, instead in _REFUSED:
        if getattr(args, name, None):
            _refuse(flag, why, instead)
    graphs = getattr(args, "cuda_graph_impl", None) or "none"
    if graphs != "none":
        _refuse(f"--cuda-graph-impl {graphs}", _GRAPHS.get(graphs, _LOCAL_GRAPHS), _ONLY_1F1B)
    if args.pipeline_model_parallel_size == 2 and getattr(args, "overlap_p2p_comm", True) is False:
        why = "on 2 pipeline ranks Megatron takes chunks only with the overlap"
        _refuse("--no-overlap-p2p-communication", why, "use 3 or more pipeline ranks")
    if settings.engine == "megatron" and settings.group_size is not None:
        why = "Megatron's loop has one group here, all micro-batches"
        _refuse(
            "--breadth-first-group-size", f"{why} (--breadth-first-engine megatron)", "use --breadth-first-engine plan"
        )
    if settings.engine == "megatron" and settings.debug_p2p:
        why = "Megatron's loop sends its messages itself (--breadth-first-engine megatron)"
        _refuse("--bfpp-debug-p2p", why, "use --breadth-first-engine plan")
    timeout_of(args)
    fully_sharded.refuse(args, settings)
    _check_warmup(args)
    _check_data(args)


def _refuse(flag: str, why: str, instead: str) -> None:
    raise UserError(
        f"{flag} does not work with --pipeline-schedule breadth-first: {why}.\n  Leave out {flag.split()[0]}, or {instead}."
    )


def _check_warmup(args: Any) -> None:
    """A learning rate that is still warming up when it should have decayed; Megatron finds out after the model is built."""
    if getattr(args, "skip_train", False):
        return
    for unit in ("iters", "samples"):
        total = getattr(args, f"train_{unit}", None)
        if total:
            break
    else:
        return
    decay, flag = getattr(args, f"lr_decay_{unit}", None), f"--lr-decay-{unit}"
    if decay is None:
        decay, flag = total, f"--train-{unit}"
    fraction = getattr(args, "lr_warmup_fraction", None)
    if fraction is not None and fraction >= 1:
        raise UserError(f"--lr-warmup-fraction is {fraction}: no step is left to decay in.\n  Use a number below 1.")
    warmup = getattr(args, f"lr_warmup_{unit}", None) or 0
    if fraction is None and warmup >= decay:
        raise UserError(
            f"--lr-warmup-{unit} is {warmup}, but the learning rate has decayed after {decay} ({flag}).\n"
            f"  Use --lr-warmup-{unit} {max(0, decay - 1)} or less, or a larger {flag}."
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

"""Megatron's command line with the plugin's flags: refused, completed and reported before any model is built."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..schedule.model.pattern import is_hybrid
from . import process, relied_on
from .cpu.arguments import cpu_arguments
from .flags import fully_sharded
from .flags.arguments import refuse, refuse_on_cuda
from .flags.batches import few_microbatches
from .flags.placement import place
from .flags.settings import Settings, add_flags, is_sharded, settings_of
from .flags.stages import check_placement
from .observe.apply import observe
from .process import say
from .relied_on.training import NO_PIPELINE
from .step import fully_sharded_seams

Report = Callable[[Any, list[str]], object]  # Megatron's arguments; lines about them


def report_on_first_rank(args: Any, lines: list[str]) -> None:
    """Print the lines, on rank 0."""
    if args.rank == 0:
        for line in lines:
            say(line)


@dataclass(frozen=True)
class Validation:
    """What Megatron's validation of a command line becomes.

    device: "cuda" or "cpu". on_1f1b: leaves Megatron alone. report: takes the lines to print.
    """

    device: str
    on_1f1b: Callable[[], None]
    report: Report = report_on_first_rank

    def of_args(self, validate: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Any:
        """Run Megatron's validate_args."""
        settings, lines = self._chosen(args), []
        is_breadth_first = settings.schedule != "1f1b"
        if is_breadth_first:
            relied_on.check(*parts_of(settings, args))  # first: what refuses reads Megatron's and torch's code too
            self._refuse(args, settings)
        else:
            fully_sharded.refuse_under_1f1b(args)
        if self.device == "cpu":
            lines += [f"on a CPU: {line}" for line in cpu_arguments(args)]
            if is_hybrid(args):
                relied_on.check(relied_on.HYBRID_ON_CPU)
        if is_breadth_first:
            lines += place(args)
        else:
            self.on_1f1b()
            lines.append("1f1b: Megatron's own schedule, untouched")
            if settings.debug_p2p:
                lines.append("WARNING: --bfpp-debug-p2p has no effect under 1f1b, whose messages Megatron sends")
        lines += observe(args)
        shards = is_breadth_first and is_sharded(args)
        with NO_PIPELINE.removed_from(validate) if shards else nullcontext():
            validated = validate(args, *more, **kwargs)
        if is_breadth_first:
            lines += _check_validated(args, settings)
        args.bfpp_has_validated = True
        self.report(args, [*relied_on.strange_release(), *lines])
        return validated

    def of_yaml(self, validate: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Any:
        """Run Megatron's validate_yaml: --yaml-cfg throws the command line away, the plugin's flags with it.

        They are read from the YAML file, then from the command line. The number of chunks is not chosen here: the file
        is Megatron's own nested format, and is checked after Megatron has read it.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_flags(parser, default=None)
        for name, value in vars(parser.parse_known_args()[0]).items():
            if not hasattr(args, name):
                setattr(args, name, value)
        settings = self._chosen(args)
        lines = observe(args)
        validated = validate(args, *more, **kwargs)
        if settings.schedule == "1f1b":
            fully_sharded.refuse_under_1f1b(validated)
            self.on_1f1b()
        else:
            relied_on.check(*parts_of(settings, validated))
            self._refuse(validated, settings)
            lines += _check_validated(validated, settings)
        validated.bfpp_has_validated = True
        self.report(validated, [*relied_on.strange_release(), *lines])
        return validated

    def _chosen(self, args: Any) -> Settings:
        settings = settings_of(args, process.explicit_schedule)
        args.pipeline_schedule = settings.schedule
        return settings

    def _refuse(self, args: Any, settings: Settings) -> None:
        refuse(args, settings)
        if self.device == "cuda":
            refuse_on_cuda(args, settings)


def parts_of(settings: Settings, args: Any = None) -> list[relied_on.Part]:
    """Return what a breadth-first job relies on beside every other one. args: Megatron's, where they are known."""
    graphs = getattr(args, "cuda_graph_impl", None) == "local" or getattr(args, "enable_cuda_graph", False)
    asked = (
        (relied_on.LOOP if settings.engine == "megatron" else relied_on.PLAN, True),
        (relied_on.DEFERRED, settings.weight_gradients != "with-backward"),
        (relied_on.SHARDED, is_sharded(args)),
        (relied_on.GRAPHS, graphs),
        (relied_on.HYBRID, is_hybrid(args)),
    )
    return [part for part, is_asked in asked if is_asked]


def _check_validated(args: Any, settings: Settings) -> list[str]:
    """Check the arguments that Megatron has completed, before a model is built; return lines to print."""
    if is_sharded(args):
        fully_sharded_seams.apply()
    lines = [check_placement(args), *few_microbatches(args)]
    fully_sharded.check_resident_chunks(args, settings)
    if getattr(args, "microbatch_group_size_per_vp_stage", None) is not None:
        lines.append(
            "WARNING: --microbatch-group-size-per-virtual-pipeline-stage belongs to 1f1b and has no effect; "
            "see --breadth-first-group-size"
        )
    return lines

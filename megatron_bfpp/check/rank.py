"""One rank of a job that has not started: command line validated, chunks built on the meta device, plan checked.

Runs in a process of its own that poses as that rank among torch's fake process groups of the real world size. Megatron
parses and validates the command line as on the GPU cluster; only then does substitutes.py replace what a machine
without GPUs, data and tokenizer lacks.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from ..console.errors import UserError
from ..integration.flags.batches import data_parallel_size, evaluation_microbatches, microbatch_counts
from ..integration.flags.settings import settings_of, word_of_job
from ..integration.flags.stages import stages_of
from ..integration.gpt.releases import ARGS_DEFAULTS, refuse_other_tasks
from ..integration.seams import changed
from ..schedule import PipelineShape, ScheduleError, check, lower, simulate
from ..schedule.formats import digest
from ..schedule.model.pattern import is_hybrid
from ..schedule.names import order_of
from .answers import Chunk, Job, PlanLine, Question, Rank

# As far as validation asks for a GPU: where no kind of GPU is named, the newest, of which Megatron demands least.
NEWEST = 10


def examine(question: Question, pp_rank: int, with_plans: bool) -> Rank:
    """Pose as pipeline rank `pp_rank` (data-parallel rank 0, tensor rank 0). Once per process.

    Raises UserError for what Megatron, the plugin or the entry point refuses.
    """
    from ..integration.activation import enable_for_dry_run

    os.environ.clear()
    os.environ.update(question.environment)
    local = min(question.gpus_per_node, question.world_size)
    os.environ.update(WORLD_SIZE=str(question.world_size), LOCAL_WORLD_SIZE=str(local), RANK="0", LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # nothing listens: the process groups are fake
    capability = SimpleNamespace(name="dry run", major=question.capability or NEWEST, minor=0, total_memory=0)
    reported: list[str] = []
    with megatron_speaks_plainly():
        enable_for_dry_run(lambda args, lines: reported.extend(lines))
        torch.cuda.get_device_properties = lambda *_, **__: capability  # type: ignore[assignment]
        args, changes = _validated(question, pp_rank)
        job = _job(args, reported, changes)
        plans = _plans(args, job) if with_plans else []
        job = replace(job, vocab_size=_initialize(args))
        return Rank(pp_rank, job, list(_chunks(args, pp_rank, job)), plans)


@contextmanager
def megatron_speaks_plainly() -> Iterator[None]:
    """Turn Megatron's refusals (assertions, other errors, its parser's, its exits) into UserErrors of one sentence."""

    def refuse_words(parser: argparse.ArgumentParser, message: str) -> None:
        raise UserError(f"Megatron does not take this command line: {message}.")

    try:
        with changed(argparse.ArgumentParser, error=refuse_words):
            yield
    except UserError:
        raise
    except SystemExit as stop:
        raise UserError(f"Megatron ends here with exit code {stop.code}.") from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or frame.line or ""
        kind = "" if isinstance(error, AssertionError | ValueError | RuntimeError) else f"{type(error).__name__}: "
        place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
        raise UserError(f"Megatron refuses this configuration: {kind}{text} ({place}).") from error


def _validated(question: Question, pp_rank: int) -> tuple[Any, list[str]]:
    """Return Megatron's validated arguments, and a line for each change of them."""
    from megatron.training import arguments

    from .substitutes import after_validation, before_validation, unknown_words_in, without_other_jobs

    sys.argv = ["bfpp check", *question.words]
    with unknown_words_in(question.passes_over) as changes:
        args = arguments.parse_args()
    if args.yaml_cfg is not None:
        raise UserError("bfpp check does not read --yaml-cfg.\n  Give the model with Megatron's flags.")
    changes += without_other_jobs(args)
    refuse_other_tasks(args, not _trainer_builds())
    tokenizer = args.tokenizer_type
    for name, value in ARGS_DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    changes += before_validation(args, tokenizer)
    _be_rank(args, pp_rank)
    arguments.validate_args(args, ARGS_DEFAULTS)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % groups:  # which Megatron finds out in the first forward
        raise UserError(
            f"--num-attention-heads {args.num_attention_heads} is no multiple of --num-query-groups {groups}.\n"
            "  Change one of them: each group of queries has one head of keys and values."
        )
    return args, changes + after_validation(args)


def _be_rank(args: Any, pp_rank: int) -> None:
    """Set the global rank of this pipeline rank, in the order in which Megatron numbers them."""
    inner = (
        args.tensor_model_parallel_size * args.context_parallel_size * (getattr(args, "gtp_weight_remat_size", 1) or 1)
    )
    pp_size = args.pipeline_model_parallel_size
    stride = inner if args.use_tp_pp_dp_mapping else args.world_size // max(1, pp_size)
    args.rank = pp_rank * stride
    args.local_rank = args.rank % int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ.update(RANK=str(args.rank), LOCAL_RANK=str(args.local_rank))


def _job(args: Any, reported: list[str], changes: list[str]) -> Job:
    settings = settings_of(args)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    group = settings.group_size
    if settings.schedule == "1f1b":
        group = getattr(args, "microbatch_group_size_per_vp_stage", None)
    count, pp_size, stages = microbatch_counts(args)[-1], args.pipeline_model_parallel_size, stages_of(args)
    return Job(
        tp=args.tensor_model_parallel_size, pp=pp_size, dp=data_parallel_size(args), chunks=chunks,
        micro_batch=args.micro_batch_size, global_batch=args.global_batch_size, num_microbatches=count,
        schedule=word_of_job(args, count), backward=settings.backward, group=group,
        resident_chunks=settings.resident_chunks_of(chunks) if args.use_torch_fsdp2 and chunks > 1 else None,
        stage_layers=[stage.layers for stage in stages], stage_kinds=[stage.kinds for stage in stages],
        told=reported, changed=changes,
    )  # fmt: skip


def _plans(args: Any, job: Job) -> list[PlanLine]:
    """Check the plans of the training steps with the fewest and the most micro-batches, and of an evaluation step."""
    if job.pp == 1:
        return []
    counts = microbatch_counts(args)
    steps = [("training", count) for count in sorted({counts[0], counts[-1]})]
    if settings_of(args).schedule == "1f1b":
        return [_plan(args, job, "Megatron's", count) for _, count in steps]
    return [_plan(args, job, *step) for step in [*steps, ("evaluation", evaluation_microbatches(args))]]


def _plan(args: Any, job: Job, what: str, count: int) -> PlanLine:
    """Check one plan. Megatron's own schedule has none: its order is checked as one.

    Raises ValueError for an order that Megatron refuses in the first step.
    """
    shape = PipelineShape(job.pp, job.chunks, count)
    try:
        if what != "Megatron's":
            plan = settings_of(args).plan_of(shape, what == "evaluation", job.resident_chunks is not None)
            owed = tuple(plan.peak_owed_weight_gradients) if plan.is_split else ()
            return PlanLine(what, count, plan.digest, plan.bubble_fraction, owed=owed)
        order = order_of("1f1b" if job.chunks == 1 else "interleaved", shape, job.group)
        lowered = lower(order, shape)
        check(lowered, shape)
    except ScheduleError as error:
        return PlanLine(what, count, unsound=str(error))
    return PlanLine(what, count, digest(lowered), simulate(order, shape).bubble_fraction)


def _initialize(args: Any) -> int:
    """Run Megatron's own start as far as its process groups, which are fake. Return the words of the tokenizer."""
    from megatron.core import mpu
    from megatron.training import get_tokenizer, initialize
    from megatron.training.global_vars import set_global_variables

    from ..integration.gpt.script import embedding_ranks

    if hasattr(initialize, "validate_args"):  # 0.17 parses and validates here, which is done
        with changed(initialize, validate_args=lambda args, defaults: args):
            initialize.initialize_megatron(parsed_args=args, get_embedding_ranks=embedding_ranks)
    else:
        set_global_variables(args)
        initialize.initialize_megatron(get_embedding_ranks=embedding_ranks)
    found = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
    if found != (0, 0):
        raise AssertionError(f"rank {args.rank} is not the first of its tensor and data group but {found}")
    return int(get_tokenizer().vocab_size)


def _chunks(args: Any, pp_rank: int, job: Job) -> Iterator[Chunk]:
    """Build each chunk on the meta device, count its parameters and let it go."""
    from .local_layers import local_layers
    from .substitutes import attention_of_any_kind

    build = _builder(args)
    for chunk in range(job.chunks):
        stage = chunk * job.pp + pp_rank
        ends = {"pre_process": stage == 0, "post_process": stage == job.pp * job.chunks - 1}
        # CUDA's current device, which Megatron names, goes before the default one.
        on_meta = changed(torch.cuda, current_device=lambda: torch.device("meta"))
        with attention_of_any_kind(), local_layers(args), on_meta, torch.device("meta"):
            model = build(vp_stage=chunk if job.chunks > 1 else None, **ends)
        layers = {layer.layer_number: _count(layer) for layer in model.decoder.layers}
        yield Chunk(stage, layers, _count(model))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _builder(args: Any) -> Callable[..., Any]:
    """Return the builder of a chunk: the trainer's own, of megatron-core 0.19, or before it the entry point's."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    if _trainer_builds():
        from megatron.training import argument_utils

        kind = "hybrid" if is_hybrid(args) else "gpt"
        config = getattr(argument_utils, f"{kind}_config_from_args")(args)
        builder = config.get_builder_cls()(config)
        return lambda **chunk: builder.build_model(groups, **chunk)
    from ..integration.gpt.model import build_gpt, build_hybrid

    build = build_hybrid if is_hybrid(args) else build_gpt
    return lambda **chunk: build(pg_collection=groups, **chunk)


def _trainer_builds() -> bool:
    """Return whether Megatron's trainer builds the model, as it does from 0.19 on."""
    from megatron.training import argument_utils

    return hasattr(argument_utils, "gpt_config_from_args")

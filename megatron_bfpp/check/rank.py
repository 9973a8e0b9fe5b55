"""One rank of a job that has not started: its command line validated, its model chunks built on the meta device, its plan checked.

Runs in a process of its own that poses as that rank among torch's fake process groups of the real world size. Megatron parses
and validates the command line as on the GPU cluster; only then is changed what a machine without GPUs, data and tokenizer lacks.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..console.errors import UserError
from ..integration.flags.settings import Settings, settings_of, word_of_job
from ..schedule import PipelineShape, ScheduleError, check, interleaved_1f1b, lower, one_f_one_b, simulate
from ..schedule.formats import digest
from ..schedule.plan import plan_of
from .answers import Chunk, Job, PlanLine, Question, Rank

# As far as validation asks for a GPU: where no kind of GPU is named, the newest, of which Megatron demands least.
NEWEST = 10


def examine(
    question: Question, pp_rank: int, with_plans: bool, refuse: Callable[[Any, bool], None], defaults: dict[str, Any]
) -> Rank:
    """Pose as pipeline rank `pp_rank` (data-parallel rank 0, tensor rank 0). Once per process.

    refuse: the entry point's refusals, of the parsed arguments, and whether the entry point builds the model. defaults: of its
    arguments. Raises UserError for what Megatron or the plugin refuses.
    """
    from ..integration.activation import enable_for_dry_run

    os.environ.clear()
    os.environ.update(question.environment)
    local = min(question.gpus_per_node, question.world_size)
    os.environ.update(WORLD_SIZE=str(question.world_size), LOCAL_WORLD_SIZE=str(local), RANK="0", LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # nothing listens: the process groups are fake
    capability = SimpleNamespace(name="dry run", major=question.capability or NEWEST, minor=0, total_memory=0)
    told: list[str] = []
    with megatron_speaks_plainly():
        enable_for_dry_run(lambda args, lines: told.extend(lines))
        torch.cuda.get_device_properties = lambda *_, **__: capability  # type: ignore[assignment]
        job, args = _validated(question, pp_rank, refuse, defaults, told)
        plans = _plans(args, job) if with_plans else []
        _initialize(args)
        return Rank(pp_rank, job, list(_chunks(args, pp_rank, job)), plans)


@contextmanager
def megatron_speaks_plainly() -> Iterator[None]:
    """Megatron's refusals as UserErrors of one sentence: assertions and other errors, its parser's, its exits."""

    def refuse_words(parser: argparse.ArgumentParser, message: str) -> None:
        raise UserError(f"Megatron does not take this command line: {message}.")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = refuse_words  # type: ignore[assignment, method-assign]
    try:
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
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


# The command line


def _validated(
    question: Question,
    pp_rank: int,
    refuse: Callable[[Any, bool], None],
    defaults: dict[str, Any],
    told: list[str],
) -> tuple[Job, Any]:
    from megatron.training import arguments

    from .substitutes import after_validation, before_validation

    sys.argv = ["bfpp check", *question.words]
    args = arguments.parse_args()
    if args.yaml_cfg is not None:
        raise UserError("bfpp check does not read --yaml-cfg.\n  Give the model with Megatron's flags.")
    if args.use_checkpoint_args:
        raise UserError(
            "--use-checkpoint-args takes the model from a checkpoint, which a dry run does not read.\n"
            "  Leave it out and give the model with Megatron's flags."
        )
    refuse(args, not _trainer_builds())
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    changed = before_validation(args)
    _be_rank(args, pp_rank)
    arguments.validate_args(args, defaults)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % groups:  # which Megatron finds out in the first forward
        raise UserError(
            f"--num-attention-heads {args.num_attention_heads} is no multiple of --num-query-groups {groups}.\n"
            "  Change one of them: each group of queries has one head of keys and values."
        )
    changed += after_validation(args)
    return _job(args, told, changed), args


def _be_rank(args: Any, pp_rank: int) -> None:
    """The global rank of this pipeline rank, in the order in which Megatron numbers them."""
    inner = (
        args.tensor_model_parallel_size * args.context_parallel_size * (getattr(args, "gtp_weight_remat_size", 1) or 1)
    )
    pp_size = args.pipeline_model_parallel_size
    stride = inner if args.use_tp_pp_dp_mapping else args.world_size // max(1, pp_size)
    args.rank = pp_rank * stride
    args.local_rank = args.rank % int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ.update(RANK=str(args.rank), LOCAL_RANK=str(args.local_rank))


def _job(args: Any, told: list[str], changed: list[str]) -> Job:
    from ..integration.flags.batches import data_parallel_size, microbatch_counts
    from ..integration.flags.placement import is_hybrid
    from ..integration.flags.stages import stages_of

    if is_hybrid(args):
        raise UserError("bfpp check does not know hybrid models.\n  Leave out --hybrid-layer-pattern.")
    settings = settings_of(args)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    group = settings.group_size
    if settings.schedule == "1f1b":
        group = getattr(args, "microbatch_group_size_per_vp_stage", None)
    count = microbatch_counts(args)[-1]
    return Job(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        dp=data_parallel_size(args),
        chunks=chunks,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        num_microbatches=count,
        schedule=word_of_job(args, count),
        backward=settings.backward,
        group=group,
        resident_chunks=settings.resident_chunks_of(chunks) if args.use_torch_fsdp2 and chunks > 1 else None,
        stage_layers=[stage.layers for stage in stages_of(args)],
        told=told,
        changed=changed,
    )  # fmt: skip


# The plans


def _plans(args: Any, job: Job) -> list[PlanLine]:
    """Of the training steps with the fewest and the most micro-batches, and of an evaluation step."""
    from ..integration.flags.batches import evaluation_microbatches, microbatch_counts

    if job.pp == 1:
        return []
    counts = microbatch_counts(args)
    steps = [("training", count) for count in sorted({counts[0], counts[-1]})]
    settings = settings_of(args)
    if settings.schedule == "1f1b":
        return [_plan_of_megatron(job, count) for _, count in steps]
    return [
        _plan(settings, job, what, count) for what, count in [*steps, ("evaluation", evaluation_microbatches(args))]
    ]


def _plan(settings: Settings, job: Job, what: str, count: int) -> PlanLine:
    shape = PipelineShape(job.pp, job.chunks, count)
    try:
        plan = plan_of(
            shape, settings.group_size, settings.backward == "eager", what == "evaluation", job.resident_chunks
        )
    except ScheduleError as error:
        return PlanLine(what, count, unsound=str(error))
    return PlanLine(what, count, plan.digest, plan.bubble_fraction)


def _plan_of_megatron(job: Job, count: int) -> PlanLine:
    """Megatron's own schedule has no plan; its order is checked as one. ValueError for what Megatron refuses in the first step."""
    shape = PipelineShape(job.pp, job.chunks, count)
    order = one_f_one_b(shape) if job.chunks == 1 else interleaved_1f1b(shape, job.group)
    plan = lower(order, shape)
    try:
        check(plan, shape)
    except ScheduleError as error:
        return PlanLine("Megatron's", count, unsound=str(error))
    return PlanLine("Megatron's", count, digest(plan), simulate(order, shape).bubble_fraction)


# The model


def _initialize(args: Any) -> None:
    """Megatron's own start, as far as its process groups, which are fake."""
    from megatron.core import mpu
    from megatron.training import initialize
    from megatron.training.global_vars import set_global_variables

    from ..integration.gpt.script import embedding_ranks

    if hasattr(initialize, "validate_args"):  # 0.17 parses and validates here, which is done
        initialize.validate_args = lambda args, defaults: args
        initialize.initialize_megatron(parsed_args=args, get_embedding_ranks=embedding_ranks)
    else:
        set_global_variables(args)
        initialize.initialize_megatron(get_embedding_ranks=embedding_ranks)
    found = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
    if found != (0, 0):
        raise AssertionError(f"rank {args.rank} is not the first of its tensor and data group but {found}")


def _chunks(args: Any, pp_rank: int, job: Job) -> Iterator[Chunk]:
    """Each is built on the meta device, counted and let go."""
    build = _builder(args)
    for chunk in range(job.chunks):
        stage = chunk * job.pp + pp_rank
        ends = {"pre_process": stage == 0, "post_process": stage == job.pp * job.chunks - 1}
        with _on_meta():
            model = build(vp_stage=chunk if job.chunks > 1 else None, **ends)
        layers = {layer.layer_number: _count(layer) for layer in model.decoder.layers}
        yield Chunk(stage, layers, _count(model))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _on_meta() -> Iterator[None]:
    """Megatron names the current device for what it allocates, which goes before torch's default device."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = before


def _builder(args: Any) -> Callable[..., Any]:
    """What builds a chunk: the trainer's own builder, of megatron-core 0.19, or before it the entry point's."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    if _trainer_builds():
        from megatron.training.argument_utils import gpt_config_from_args

        config = gpt_config_from_args(args)
        builder = config.get_builder_cls()(config)
        return lambda **chunk: builder.build_model(groups, **chunk)
    from ..integration.gpt.model import build_gpt

    return lambda **chunk: build_gpt(pg_collection=groups, **chunk)


def _trainer_builds() -> bool:
    """From 0.19 on."""
    from megatron.training import argument_utils

    return hasattr(argument_utils, "gpt_config_from_args")

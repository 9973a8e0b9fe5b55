"""The breadth-first schedule behind Megatron's forward_backward_pipelining_with_interleaving: same call, same result.

Every step goes through `run`: it checks the call, looks up the checked plan of its shape (the number of micro-batches
comes from the call and may change from step to step), and has an `Executor` run this rank's part of it with Megatron's
own forward_step and backward_step. The function keeps nothing between calls and restores what it changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import megatron.core.utils as core_utils
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, nvtx_range_pop, nvtx_range_push

from ...console.version import __version__
from ...runtime.channels import ChannelGroups
from ...runtime.executor import Executor
from ...runtime.p2p import Messages
from ...runtime.weight_gradients import OwedGradients, covers
from ...schedule import Action, PipelineShape
from ...schedule.lower import DEFAULT_HOP
from ...schedule.plan import Plan
from .. import process
from ..flags.settings import Settings
from ..seams import changed
from . import cuda_graphs, fully_sharded, replicas, weight_gradients
from .call import StepCall, check_config
from .compute import MegatronCompute
from .groups import channel_groups, forget, header_group, process_groups, reset_offloading

_announced: set[tuple[str, str]] = set()  # engine and plan of the lines that this process has in its log


def run(settings: Settings, **arguments: Any) -> list[Any]:
    """Run one breadth-first step.

    arguments: those of Megatron's interleaved schedule, all by keyword (StepCall). Returns what it returns: the reports
    of the loss function on the last stage, an empty list elsewhere.
    """
    call = StepCall(**arguments)
    config = get_model_config(call.model[0])
    check_config(config)
    pp_group, groups = process_groups(call.p2p_communicator, call.pg_collection)
    shape = PipelineShape(pp_group.size(), len(call.model), call.num_microbatches)
    is_sharded = fully_sharded.is_sharded(call.model)
    variable_shapes = config.variable_seq_lengths or getattr(config, "mtp_standalone", False)
    plan = settings.plan_of(shape, call.forward_only, is_sharded, is_ahead=not variable_shapes)
    pp_rank, device = pp_group.rank(), process.this_device()
    channels = channel_groups(pp_group, device)
    process.begin_step(call.forward_only, shape, channels.ranks, pp_rank)
    owed = _owed(settings, shape, call, groups, plan, channels.ranks, pp_rank)
    _announce(settings, shape, plan, call.forward_only, is_sharded, owed)
    if loads_kernels(device, channels, call.forward_only):
        plan = settings.plan_of(shape, call.forward_only, is_sharded, is_ahead=False)

    if getattr(config, "moe_paged_stash", False):  # 0.18 and later
        schedules.paged_stash_reset(enabled=not call.forward_only, config=config)
    finalize = None if call.forward_only else config.finalize_model_grads_func
    is_last_rank = pp_rank == shape.pp_size - 1
    if finalize is not None:
        embedding = schedules.clear_embedding_activation_buffer(
            config=config, model=call.model, is_last_stage=is_last_rank
        )
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

    messages = Messages(
        channels, shape, call.tensor_shape(config, groups), config.pipeline_dtype, device,
        header_group(pp_group) if settings.debug_p2p or variable_shapes else None, variable_shapes, process.ACTIVITY,
        None if process.RECORDING.recorder is None else process.RECORDING.recorder.waiting,
    )  # fmt: skip
    try:
        compute = _execute(call, config, plan, groups, pp_rank, messages)
    except BaseException:
        forget(pp_group)
        raise

    process.ACTIVITY.begin("the end of the gradients")
    if finalize is not None:
        schedules.finish_embedding_wgrad_compute(
            config=config, embedding_module=embedding, is_last_stage=is_last_rank, tp_group=groups.tp
        )
        tokens = compute.total_num_tokens if config.calculate_per_token_loss else None
        finalize(call.model, tokens, pg_collection=groups, force_all_reduce=call.force_all_reduce)
    if getattr(config, "fine_grained_activation_offloading", False):
        reset_offloading(groups)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    cuda_graphs.create(call, config)
    process.after_schedule(call.forward_only)
    return compute.store


def _execute(
    call: StepCall, config: Any, plan: Plan, groups: ProcessGroupCollection, pp_rank: int, messages: Messages
) -> MegatronCompute:
    """Run this rank's actions of a plan; return what they computed with."""
    shape, actions = messages.shape, plan.actions[pp_rank]
    if fully_sharded.is_sharded(call.model):
        gates: Any = fully_sharded.data_parallel(call.model, config)
    else:
        gates = replicas.data_parallel(config, call.model, call.forward_only)
    owed = OwedGradients(gates.added, covers(actions, shape)) if plan.is_split else None
    compute = MegatronCompute(
        call, config, pp_rank == shape.pp_size - 1, groups.cp.size(), messages.device,
        plan.peak_live_activations[pp_rank], owed, gates.before_last_weights,
    )  # fmt: skip
    recorded, deferred = process.RECORDING.around(gates, shape, pp_rank), weight_gradients.deferred(call.model, owed)
    with recorded, gates, cuda_graphs.around(call, config), deferred:
        executor = Executor(shape, compute, messages, gates, call.forward_only, _span(), process.ACTIVITY)
        executor.run(actions)
    if owed is not None:
        owed.assert_paid()
    return compute


def loads_kernels(device: torch.device, channels: ChannelGroups, forward_only: bool) -> bool:
    """Return whether this is the first step of its kind on a GPU; all ranks of a pipeline answer alike."""
    return device.type == "cuda" and channels.is_first(forward_only)


def run_megatron(settings: Settings, original: Callable[..., list[Any]], **arguments: Any) -> list[Any]:
    """Run one step by the other engine: Megatron's own loop, with all micro-batches of this call in one group."""
    call = StepCall(**arguments)
    config = get_model_config(call.model[0])
    check_config(config)
    shape = PipelineShape(config.pipeline_model_parallel_size, len(call.model), call.num_microbatches)
    if call.num_microbatches < shape.pp_size:
        raise ValueError(
            f"--breadth-first-engine megatron takes at least as many micro-batches as pipeline ranks, but there are "
            f"{call.num_microbatches} for {shape.pp_size}.\n"
            "  Use --breadth-first-engine plan, or raise --global-batch-size."
        )
    plan = settings.plan_of(shape, call.forward_only)
    _announce(settings, shape, plan, call.forward_only)
    changes: dict[str, Any] = {"microbatch_group_size_per_vp_stage": call.num_microbatches}
    if config.overlap_p2p_comm:  # nearly all of the step is warm-up and cool-down, which block without it
        changes["overlap_p2p_comm_warmup_flush"] = True
    process.begin_step(call.forward_only, shape)
    process.ACTIVITY.begin("Megatron's loop")
    total = call.num_microbatches * len(call.model)
    late = {"get_pp_rank_microbatches": lambda *_, **__: (total, True, total, 0)}
    with changed(config, **changes), changed(schedules, **({} if settings.backward == "eager" else late)):
        answer = original(**arguments)
    process.after_schedule(call.forward_only)
    return answer


@contextmanager
def _nvtx(action: Action) -> Iterator[None]:
    nvtx_range_push(f"PP:{action}")
    try:
        yield
    finally:
        nvtx_range_pop(f"PP:{action}")


def _span() -> Callable[[Action], AbstractContextManager[None]] | None:
    """Return the context around every action: named ranges under --nvtx-ranges, notes in a recorded step, or both."""
    recorder = process.RECORDING.recorder
    if recorder is None:
        return _nvtx if core_utils._nvtx_enabled else None
    if not core_utils._nvtx_enabled:
        return recorder.span

    @contextmanager
    def both(action: Action) -> Iterator[None]:
        with _nvtx(action), recorder.span(action):
            yield

    return both


def _owed(
    settings: Settings, shape: PipelineShape, call: StepCall, groups: ProcessGroupCollection, plan: Plan,
    ranks: Sequence[int], pp_rank: int,
) -> str:  # fmt: skip
    """Say how many weights' gradients of `plan` wait and what they keep, for the line at start.

    A rank of the first pipeline that computes some layers whole says so itself, once.
    """
    if call.forward_only or ("owed", plan.digest) in _announced:
        return ""
    _announced.add(("owed", plan.digest))
    gain = settings.weight_lags_of(shape)[1]
    if not plan.is_split:
        is_auto = settings.weight_gradients == "auto"
        return f", weights' gradients with the backward (auto: to defer them gains {gain:.1%})" if is_auto else ""
    whole = [name for chunk in call.model for name in weight_gradients.splittable(chunk)[1]]
    if whole and 0 in ranks:
        print(
            f"megatron_bfpp: pp_rank {pp_rank} computes the weights' gradients of {len(whole)} layers within the "
            f"backward of the input, whole: {', '.join(whole[:4])}{' ...' if len(whole) > 4 else ''}",
            flush=True,
        )
    kept = ""
    if not get_model_config(call.model[0]).variable_seq_lengths:  # else the sizes of the call mean nothing
        tokens = call.seq_length * call.micro_batch_size // groups.cp.size()
        size = max(weight_gradients.owed_bytes(chunk, get_model_config(chunk), tokens) for chunk in call.model)
        kept = f" ({size / 2**20:.3g} MiB each)"
    fewest, most = min(plan.peak_owed_weight_gradients), max(plan.peak_owed_weight_gradients)
    return (
        f", weights' gradients of {fewest} to {most} micro-batches wait on a rank{kept}, which gains {gain:.1%} in "
        "simulation"
    )


def _announce(
    settings: Settings, shape: PipelineShape, plan: Plan, evaluation: bool, is_sharded: bool = False, owed: str = ""
) -> None:
    """Print one greppable line per shape on the first rank: the schedule and the hash of its plan.

    owed: what is to be said of split backwards.
    """
    key = settings.engine, plan.digest
    if key in _announced:
        return
    _announced.add(key)
    if torch.distributed.get_rank() != 0:
        return
    group = "" if settings.group_size is None else f", groups of {settings.group_size}"
    what = "evaluation" if evaluation else f"{settings.backward} backward{group}{owed}"
    if is_sharded:
        resident = settings.resident_chunks_of(shape.num_chunks)
        what += f", fully sharded with {resident} resident chunks ({plan.gathers} gathers per rank)"
    what += _places(settings, shape, plan, evaluation, is_sharded)
    print(
        f"megatron_bfpp {__version__}: breadth-first, PP {shape.pp_size} x {shape.num_chunks} chunks = "
        f"{shape.num_stages} stages, {shape.num_microbatches} micro-batches, {what}, engine {settings.engine}, "
        f"predicted bubble {plan.bubble_fraction:.1%}, plan {plan.digest}",
        flush=True,
    )


def _places(settings: Settings, shape: PipelineShape, plan: Plan, evaluation: bool, is_sharded: bool) -> str:
    """Say for which latency the receives of `plan` are placed, if it was chosen; they may have no place for it."""
    if settings.hop == DEFAULT_HOP or plan is not settings.plan_of(shape, evaluation, is_sharded):
        return ""
    usual = replace(settings, hop=DEFAULT_HOP).plan_of(shape, evaluation, is_sharded)
    as_usual = f" (they stand as for {DEFAULT_HOP})" if plan.digest == usual.digest else ""
    return f", receives placed for a hop of {settings.hop:g}{as_usual}"

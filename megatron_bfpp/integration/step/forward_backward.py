"""The breadth-first schedule behind Megatron's forward_backward_pipelining_with_interleaving: same call, same result.

Every step goes through `run`: it checks the call, looks up the checked plan of its shape (the number of micro-batches
comes from the call and may change from step to step), and has an `Executor` run this rank's part of it with Megatron's
own forward_step and backward_step. The function keeps nothing between calls and restores what it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import Any

import megatron.core.utils as core_utils
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, nvtx_range_pop, nvtx_range_push

from ...console.version import __version__
from ...runtime.data_parallel import DataParallel
from ...runtime.executor import Executor
from ...runtime.fully_sharded import FullySharded
from ...runtime.p2p import ChannelGroups, Messages
from ...schedule import Action, PipelineShape
from ...schedule.plan import Plan
from .. import process
from ..flags.settings import Settings
from ..seams import changed
from . import fully_sharded, replicas
from .call import check_call, check_config
from .groups import channel_groups, process_groups


class MegatronCompute:
    """Megatron's forward and backward of one micro-batch, for the executor. One object per step.

    call: what the schedule was called with. max_outstanding: the most forwards of this rank that await their backward.
    """

    def __init__(
        self,
        call: dict[str, Any],
        config: Any,
        is_last_rank: bool,
        cp_size: int,
        device: torch.device,
        max_outstanding: int,
    ):
        self.store: list[Any] = []  # what the loss function reports, on the last stage
        self.total_num_tokens = torch.zeros([], dtype=torch.int, device=device)
        self._iterators, self._model, self._config = call["data_iterator"], call["model"], config
        self._first_val_step, self._forward_only = call["first_val_step"], call["forward_only"]
        self._is_last_rank, self._max_outstanding = is_last_rank, max_outstanding
        self._partial = config.num_microbatches_with_partial_activation_checkpoints
        self._forwards = 0
        self._forward_step = partial(
            schedules.forward_step, call["forward_step_func"], num_microbatches=call["num_microbatches"],
            forward_data_store=self.store, config=config, cp_group_size=cp_size,
            collect_non_loss_data=call["collect_non_loss_data"],
        )  # fmt: skip

    def forward(self, chunk: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        output, num_tokens = self._forward_step(
            self._iterators[chunk],
            self._model[chunk],
            input_tensor=received,
            checkpoint_activations_microbatch=self._checkpoints_all_layers(),
            is_first_microbatch=schedules.check_first_val_step(
                self._first_val_step, self._forward_only, microbatch == 0
            ),
            current_microbatch=microbatch,
            vp_stage=chunk,
            is_last_stage=self._is_last_rank and chunk == len(self._model) - 1,
        )
        self.total_num_tokens += num_tokens
        self._forwards += 1
        return output

    def backward(
        self, received: torch.Tensor | None, output: torch.Tensor, grad: torch.Tensor | None
    ) -> torch.Tensor | None:
        return schedules.backward_step(received, output, grad, self._config)

    def release(self, output: torch.Tensor) -> None:
        schedules.deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)

    def _checkpoints_all_layers(self) -> bool | None:
        """Megatron's window of partial activation checkpointing (arXiv 2205.05198, appendix C), None without it."""
        return None if self._partial is None else self._forwards % self._max_outstanding >= self._partial


def run(
    settings: Settings,
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: list[Any],
    model: list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
    p2p_communicator: P2PCommunicator | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> list[Any]:
    """One breadth-first step; parameters and result as Megatron's interleaved schedule (schedules.py, 0.19)."""
    call = {name: value for name, value in locals().items() if name != "settings"}
    check_call(call)
    config = get_model_config(model[0])
    check_config(config)
    pp_group, groups = process_groups(p2p_communicator, pg_collection)
    shape = PipelineShape(pp_group.size(), len(model), num_microbatches)
    is_sharded = fully_sharded.is_sharded(model)
    plan = settings.plan_of(shape, forward_only, is_sharded)
    pp_rank, device = pp_group.rank(), process.this_device()
    channels = channel_groups(pp_group, device)
    process.begin_step(forward_only, shape, channels.ranks, pp_rank)
    _announce(settings, shape, plan, forward_only, is_sharded)

    _reset_stash(config, forward_only)
    finalize = None if forward_only else config.finalize_model_grads_func
    is_last_rank = pp_rank == shape.pp_size - 1
    if finalize is not None:
        embedding = schedules.clear_embedding_activation_buffer(config, model, is_last_rank)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

    peak = plan.peak_live_activations[pp_rank]
    compute = MegatronCompute(call, config, is_last_rank, groups.cp.size(), device, peak)
    messages = _messages(channels, shape, _tensor_shape(call, config, groups), config, device, settings.debug_p2p)
    gates = _gates(config, model, forward_only, is_sharded)
    with process.RECORDING.around(gates, shape, pp_rank), gates:
        Executor(shape, compute, messages, gates, forward_only, _span(), process.ACTIVITY).run(plan.actions[pp_rank])

    process.ACTIVITY.begin("the end of the gradients")
    if finalize is not None:
        schedules.finish_embedding_wgrad_compute(config, embedding, is_last_rank, groups.tp)
        tokens = compute.total_num_tokens if config.calculate_per_token_loss else None
        finalize(model, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
    if getattr(config, "fine_grained_activation_offloading", False):
        schedules.off_interface.reset()
    if config.timers is not None:
        config.timers("forward-backward").stop()
    process.after_schedule(forward_only)
    return compute.store


def run_megatron(settings: Settings, original: Callable[..., list[Any]], **call: Any) -> list[Any]:
    """The other engine: Megatron's own loop, its group size set to all micro-batches of this call."""
    check_call({"adjust_tensor_shapes_fn": None, **call})
    config, microbatches = get_model_config(call["model"][0]), call["num_microbatches"]
    check_config(config)
    shape = PipelineShape(config.pipeline_model_parallel_size, len(call["model"]), microbatches)
    if microbatches < shape.pp_size:
        raise ValueError(
            f"--breadth-first-engine megatron takes at least as many micro-batches as pipeline ranks, but there are "
            f"{microbatches} for {shape.pp_size}.\n  Use --breadth-first-engine plan, or raise --global-batch-size."
        )
    plan = settings.plan_of(shape, call.get("forward_only", False))
    _announce(settings, shape, plan, call.get("forward_only", False))
    changes: dict[str, Any] = {"microbatch_group_size_per_vp_stage": microbatches}
    if config.overlap_p2p_comm:  # nearly all of the step is warm-up and cool-down, which block without it
        changes["overlap_p2p_comm_warmup_flush"] = True
    evaluation = call.get("forward_only", False)
    process.begin_step(evaluation, shape)
    process.ACTIVITY.begin("Megatron's loop")
    total = microbatches * len(call["model"])
    late = {"get_pp_rank_microbatches": lambda *_, **__: (total, True, total, 0)}
    with changed(config, **changes), changed(schedules, **({} if settings.backward == "eager" else late)):
        answer = original(**call)
    process.after_schedule(evaluation)
    return answer


def _messages(
    channels: ChannelGroups,
    shape: PipelineShape,
    sizes: tuple[int, ...],
    config: Any,
    device: torch.device,
    debug: bool,
) -> Messages:
    return Messages(
        channels, shape, sizes, config.pipeline_dtype, device,
        variable_shapes=config.variable_seq_lengths or getattr(config, "mtp_standalone", False),
        debug=debug, activity=process.ACTIVITY, waiting=None if process.RECORDING.recorder is None else process.RECORDING.recorder.waiting,
    )  # fmt: skip


def _tensor_shape(call: dict[str, Any], config: Any, groups: ProcessGroupCollection) -> tuple[int, int, int]:
    """[sequence / cp (/ tp with sequence parallelism), micro-batch, hidden]: what passes between stages."""
    sequence = call["seq_length"] // groups.cp.size()
    if config.sequence_parallel:
        sequence //= groups.tp.size()
    return sequence, call["micro_batch_size"], config.hidden_size


def _gates(
    config: Any, model: list[torch.nn.Module], evaluation: bool, is_sharded: bool
) -> DataParallel | FullySharded:
    """What gathers and reduces in one step."""
    return (
        fully_sharded.data_parallel(model, config) if is_sharded else replicas.data_parallel(config, model, evaluation)
    )


def _reset_stash(config: Any, evaluation: bool) -> None:
    if getattr(config, "moe_paged_stash", False):  # 0.18 and later
        schedules.paged_stash_reset(enabled=not evaluation, config=config)


@contextmanager
def _nvtx(action: Action) -> Iterator[None]:
    nvtx_range_push(f"PP:{action}")
    try:
        yield
    finally:
        nvtx_range_pop(f"PP:{action}")


def _span() -> Callable[[Action], AbstractContextManager[None]] | None:
    """Ranges named as the plan's actions where Megatron makes ranges, under --nvtx-ranges; notes in a recorded step."""
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


@lru_cache(maxsize=64)
def _announce_once(line: str) -> None:
    print(line, flush=True)


def _announce(settings: Settings, shape: PipelineShape, plan: Plan, evaluation: bool, is_sharded: bool = False) -> None:
    """One greppable line per shape, on the first rank: what runs, and the plan's hash to compare with other jobs."""
    if torch.distributed.get_rank() == 0:
        group = "" if settings.group_size is None else f", groups of {settings.group_size}"
        what = "evaluation" if evaluation else f"{settings.backward} backward{group}"
        if is_sharded:
            resident = settings.resident_chunks_of(shape.num_chunks)
            what += f", fully sharded with {resident} resident chunks ({plan.gathers} gathers per rank)"
        _announce_once(
            f"megatron_bfpp {__version__}: breadth-first, PP {shape.pp_size} x {shape.num_chunks} chunks = "
            f"{shape.num_stages} stages, {shape.num_microbatches} micro-batches, {what}, engine {settings.engine}, "
            f"predicted bubble {plan.bubble_fraction:.1%}, plan {plan.digest}"
        )

"""Chooses what launches Megatron's reductions and gathers in a breadth-first step: replicated and ZeRO-1 parameters.

The plan launches a chunk's reduction after its last backward and its gather under the chunk before. Two remain exposed:
the reduction of the first chunk, with which the step ends, and its gather, with which the step starts. Megatron holds
that chunk's gradients and parameters in buckets on the first pipeline rank, the last to end and the first to start.
There
  - Megatron's hooks launch the reduction bucket by bucket during the chunk's last backward, and the plan launches the
    rest;
  - the buckets are gathered in the order of the forward, which then starts with the first of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch.nn import Module, Parameter

from ...runtime.data_parallel import DataParallel

Sync = Callable[[Iterator[Parameter]], None]


def data_parallel(config: Any, model: list[Module], evaluation: bool) -> DataParallel:
    """Return the object that gathers and reduces in one step, from Megatron's config and its wrappers of the chunks.

    Functions in the config that are not Megatron's are called as its interleaved loop calls them: once per chunk.
    """
    if evaluation:  # no gradients to reduce, and Megatron gathers the parameters before it starts
        return DataParallel(None, None, None, [])
    grad_sync, param_sync = (
        [function] * len(model) if function is not None and not isinstance(function, list) else function
        for function in (config.grad_sync_func, config.param_sync_func)
    )
    first, in_backward = model[0], set()
    if grad_sync is not None and _reduces_in_buckets(first) and grad_sync[0] == first.start_grad_sync:
        in_backward, grad_sync = {0}, [partial(_reduce_rest, first), *grad_sync[1:]]
    if param_sync is None:
        param_sync = _unaligned_gathers(model)
    elif _gathers_in_buckets(first) and param_sync[0] == first.start_param_sync:
        param_sync = [partial(_gather_in_forward_order, first), *param_sync[1:]]
    return DataParallel(config.no_sync_func, grad_sync, param_sync, model, in_backward, _register)


def _reduces_in_buckets(chunk: Module) -> bool:
    # With several optimizer instances a bucket group does not remember that it was launched.
    return (
        isinstance(chunk, DistributedDataParallel)
        and chunk.ddp_config.overlap_grad_reduce
        and chunk.ddp_config.num_distributed_optimizer_instances == 1
        and len(chunk.bucket_groups) > 1
    )


def _register(chunk: Module, parameter: Parameter) -> None:
    """Tell Megatron's wrapper that a gradient is complete, as its own hooks do; it counts within a last backward only.

    The parameter's own hook has fired in an I, within no_sync, where it does not count.
    """
    if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce:
        chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)


def _reduce_rest(chunk: Any, _: Iterator[Parameter]) -> None:
    """Launch the reductions that the hooks left out: in the first step, and where a parameter had no gradient."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.grad_reduce_handle is None:
            group.start_grad_sync()
        if group.is_first_batch and len(group.per_param_grad_ready_counts) < len(group.params):
            # Megatron learns in this step how many gradients to wait for, and fails where one is missing. Without
            # counts it learns them in the next step.
            group.per_param_grad_ready_counts = {}


def _overlaps_gathers(chunk: Module) -> bool:
    return (
        isinstance(chunk, DistributedDataParallel)
        and chunk.ddp_config.overlap_param_gather
        and not chunk.overlap_param_gather_with_optimizer_step
    )


def _gathers_in_buckets(chunk: Module) -> bool:
    return _overlaps_gathers(chunk) and len(chunk.bucket_groups) > 1  # type: ignore[arg-type]


def _gather_in_forward_order(chunk: Any, _: Iterator[Parameter]) -> None:
    """Gather the buckets in the order of the forward; the chunk's own start_param_sync begins with the last layers."""
    for group in [*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups)]:
        group.start_param_sync()


def _unaligned_gathers(model: list[Module]) -> list[Sync] | None:
    """Return a gather per chunk under --no-align-param-gather, where Megatron's hooks hide nothing; None elsewhere.

    Those hooks gather a chunk when its forward needs it. On the first chunk they gather the buckets one ahead of the
    forward, which stays; the plan gathers the other chunks. Megatron removes the hooks in steps without gathers, such
    as the first one.
    """
    if not all(_overlaps_gathers(chunk) and chunk.remove_forward_pre_hook_handles for chunk in model):
        return None
    return [lambda _: None, *(chunk.start_param_sync for chunk in model[1:])]  # type: ignore[list-item]

"""Chooses the process groups of a step: the caller's or Megatron's for Megatron's part, our own for the messages."""

import hashlib
from collections import Counter
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import yaml
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from ...runtime.channels import ChannelGroups
from ..process import megatron_args
from ..seams import changed

MAX_CTAS = 4  # of NCCL, for a message; 4 of an H100's 132 SMs

_channels: WeakKeyDictionary[Any, ChannelGroups] = WeakKeyDictionary()  # pipeline group -> its channels
_headers: WeakKeyDictionary[Any, torch.distributed.ProcessGroup] = WeakKeyDictionary()
_made: Counter[tuple[str, tuple[int, ...]]] = Counter()  # groups of one description and the same ranks


def local_group(ranks: list[int], group_desc: str, **options: Any) -> torch.distributed.ProcessGroup:
    """Make a process group, collectively over `ranks` alone, whatever groups other ranks have made before.

    torch names such a group by its ranks and by how many groups this process has: by the groups that it belongs to
    before torch 2.14 (pytorch PR 189073), by those that it has made since. Ranks of a pipeline may differ in either,
    after Megatron's embedding groups and after a group of a few ranks. They then wait for each other under different
    names for ever. Here the name follows from the description, the ranks and their number, which all of them agree on.
    """
    key = group_desc, tuple(ranks)
    _made[key] += 1
    name = hashlib.sha1(f"{key} {_made[key]}".encode(), usedforsecurity=False).hexdigest()
    torchs_own = changed(torch.distributed, new_group=distributed_c10d.new_group)
    with torchs_own, changed(distributed_c10d, _hash_ranks_to_str=lambda _: name):
        # create_group adds to Megatron's list, whose timeouts --distributed-timeout-seconds-after-init changes.
        group: torch.distributed.ProcessGroup = parallel_state.create_group(
            ranks, use_local_synchronization=True, group_desc=group_desc, **options
        )
    return group


def process_groups(
    p2p: P2PCommunicator | None, groups: ProcessGroupCollection | None
) -> tuple[torch.distributed.ProcessGroup, ProcessGroupCollection]:
    """Return the pipeline group, and the groups for finalize_model_grads: the caller's, or Megatron's global ones."""
    if (p2p is None) != (groups is None):
        raise ValueError("p2p_communicator and pg_collection must be given together, or neither")
    if p2p is not None and groups is not None:
        return p2p.pp_group, groups
    if hasattr(schedules, "_build_default_pg_collection"):  # 0.19
        groups = schedules._build_default_pg_collection()
        return groups.pp, groups
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return groups.pp, groups


def _is_alive(group: torch.distributed.ProcessGroup) -> bool:
    """Return whether nobody has destroyed a group: trainers destroy the world between steps, to free its memory."""
    return group in distributed_c10d._world.pg_map


def reset_offloading(groups: ProcessGroupCollection) -> None:
    """Tell Megatron's manager of offloaded activations that a step ends, within a step's groups where it knows them."""
    if hasattr(schedules, "_reset_activation_offload"):  # after 0.19
        schedules._reset_activation_offload(pg_collection=groups)
    else:
        schedules.off_interface.reset()


def channel_groups(pp_group: torch.distributed.ProcessGroup, device: torch.device) -> ChannelGroups:
    """Return the groups for a pipeline's messages; collective over it where there are none, or none any more."""
    if pp_group not in _channels or not all(map(_is_alive, _channels[pp_group].groups)):
        options = _nccl_options() if torch.distributed.get_backend(pp_group) == "nccl" else None
        _channels[pp_group] = ChannelGroups(pp_group, device, local_group, _timeout(), options)
    return _channels[pp_group]


def forget(pp_group: torch.distributed.ProcessGroup) -> None:
    """Have the next step of a pipeline make its groups anew: of an interrupted one, messages are still under way.

    The groups are not destroyed: their other ends may be gone, and that would wait for them.
    """
    _channels.pop(pp_group, None)
    _headers.pop(pp_group, None)


def reduction_group(ranks: list[int]) -> torch.distributed.ProcessGroup:
    return local_group(ranks, "FSDP_REDUCTIONS", timeout=_timeout())


def header_group(pp_group: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup | None:
    """Return the group of gloo for the headers of a pipeline's messages; None where the process groups are fake.

    --disable-gloo-process-groups does not concern it: the headers would otherwise wait behind tensors on the device.
    """
    if torch.distributed.get_backend(pp_group) == "fake":
        return None
    if pp_group not in _headers or not _is_alive(_headers[pp_group]):
        ranks = torch.distributed.get_process_group_ranks(pp_group)
        _headers[pp_group] = local_group(ranks, "BFPP_HEADERS", backend="gloo", timeout=_timeout())
    return _headers[pp_group]


def _nccl_options() -> Any:
    """Return the options of the channels: high-priority streams and few CTAs, unless --nccl-communicator-config-path
    gives Megatron's pipeline group other ones.

    A receive is posted ahead, and its kernel waits on the GPU beside the computation. Few CTAs (Cooperative Thread
    Arrays) take few SMs from it, and a stream of high priority starts a message before queued computation.
    """
    args = megatron_args()
    choices: dict[str, Any] = {}
    if getattr(args, "nccl_communicator_config_path", None):
        with open(args.nccl_communicator_config_path, encoding="utf-8") as file:
            choices = yaml.safe_load(file) or {}
    given = choices.get("pp") or {}
    most = max(MAX_CTAS, given.get("min_ctas", 0))
    return parallel_state.get_nccl_options("pp", {"pp": {"is_high_priority_stream": True, "max_ctas": most, **given}})


def _timeout() -> timedelta | None:
    """Return --distributed-timeout-minutes; None, for torch's own, where there is no command line with it."""
    minutes = getattr(megatron_args(), "distributed_timeout_minutes", None)
    return None if minutes is None else timedelta(minutes=minutes)

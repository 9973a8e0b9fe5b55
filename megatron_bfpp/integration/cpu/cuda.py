"""A stand-in for torch.cuda on a machine without a driver: one device per rank, one stream, a clock for events."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["communication_patches", "cuda_patches"]


class _Stream(contextlib.nullcontext):  # type: ignore[type-arg]
    """The one stream of a CPU: all work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self)

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record()
        return event


class _Event:
    """A time stamp of the CPU's clock, for timers that measure with CUDA events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end.time_s - self.time_s) * 1e3  # milliseconds, as torch.cuda.Event


def _answer(value: Any) -> Callable[..., Any]:
    """Return a new function each time: torch._dynamo asserts that no two names of torch.cuda share one."""
    return lambda *args, **kwargs: value


def cuda_patches(device_count: int) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of what needs a driver. Memory counters stay: without a driver they answer 0."""
    cuda, stream = torch.cuda, _Stream()
    yield cuda, "device_count", _answer(device_count)  # training/initialize.py sets up groups and seeds if > 0
    yield cuda, "current_device", _answer(0)  # p2p_communication, tensor_parallel, timers: `device=current_device()`
    yield cuda, "set_device", _answer(None)  # training/initialize.py, async checkpoint workers
    yield cuda, "synchronize", _answer(None)  # timers, parallel_state, checkpointing
    yield cuda, "empty_cache", _answer(None)  # checkpoint load, --empty-unused-memory-level
    yield cuda, "reset_peak_memory_stats", _answer(None)  # memory reports
    yield cuda, "ipc_collect", _answer(None)  # in-process restart
    # arguments.py wants CUDA_DEVICE_MAX_CONNECTIONS=1 with TP below compute capability 10, nothing from there on.
    yield cuda, "get_device_properties", _answer(SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0))
    yield cuda, "Stream", _Stream  # DDP is built and its collectives are launched on side streams
    yield cuda, "Event", _Event  # MoE, overlapped schedules, straggler detection
    yield cuda, "current_stream", _answer(stream)
    yield cuda, "default_stream", _answer(stream)
    yield cuda, "set_stream", _answer(None)
    yield cuda, "stream", _answer(stream)
    for name in ("range_push", "range_pop"):  # --profile; builds of torch without CUDA raise
        yield cuda.nvtx, name, _answer(None)


def communication_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of what gloo does not do as NCCL."""
    barrier, isend = torch.distributed.barrier, torch.distributed.isend
    start, new_group = torch.distributed.init_process_group, torch.distributed.new_group

    def start_with_gloo(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        start(_gloo(backend), *args, **kwargs)

    def new_group_of_gloo(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kw: Any) -> Any:
        return new_group(ranks, timeout, _gloo(backend), *args, **kw)

    def isend_keeping_the_data(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return isend(tensor.detach(), *args, **kwargs)

    # parallel_state passes device_ids
    yield torch.distributed, "barrier", lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)
    # 0.17 takes the storage from a tensor (deallocate_output_tensor) while gloo still sends it; later releases wait.
    # A detached tensor keeps the storage. P2POp compares with the name of the second module.
    for module in (torch.distributed, torch.distributed.distributed_c10d):
        yield module, "isend", isend_keeping_the_data
        yield module, "init_process_group", start_with_gloo  # trainers and Megatron's own tests name NCCL
        yield module, "new_group", new_group_of_gloo
    # gloo's all-gather of several tensors corrupts memory while another of its group is under way (torch 2.9 to 2.15).
    groups: Any = torch.distributed.ProcessGroup
    gather = groups.all_gather_single if hasattr(groups, "all_gather_single") else groups._allgather_base

    def gather_one_by_one(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *more: Any) -> _Works:
        return _Works([gather(group, *pair, *more) for pair in zip(outputs, inputs, strict=True)])

    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):  # since torch 2.14; before
        if hasattr(groups, name):
            yield groups, name, gather_one_by_one


class _Works(torch.distributed.Work):
    """Several operations that end together."""

    def __init__(self, works: list[Any]):
        super().__init__()
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait()
        return True


def _gloo(backend: Any) -> Any:
    """Return gloo for NCCL, alone or as that of CUDA's tensors ("cpu:gloo,cuda:nccl")."""
    return "gloo" if isinstance(backend, str) and "nccl" in backend.lower() else backend

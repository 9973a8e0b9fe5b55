"""The chunks of `bfpp bench` under data parallelism: Megatron's and torch's own wrappers with emulated collectives. Runs in each rank."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)
from torch.distributed.pipelining import PipelineStage

from ..integration.seams import changed
from ..runtime import fully_sharded
from .emulate.collectives import Collective, Collectives
from .emulate.stages import EmulatedChunk, Layer


@dataclass(frozen=True)
class ReplicaTimes:
    """Data parallelism of a case; the times are those of one chunk, in seconds.

    buckets: the layers of a chunk. Each is a bucket where Megatron makes buckets, in the first chunk of the first rank, and a unit of FSDP.
    """

    size: int = 1
    reduction_s: float = 0.0
    gather_s: float = 0.0
    buckets: int = 1


ALONE = ReplicaTimes()


def under_ddp(
    chunk: EmulatedChunk, times: ReplicaTimes, collectives: Collectives, in_buckets: bool
) -> DistributedDataParallel:
    """A chunk in Megatron's DistributedDataParallel with its distributed optimizer, everything overlapped.

    in_buckets: a bucket for each layer, which Megatron itself does on the first pipeline rank only.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1,
    )  # fmt: skip
    ddp = DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=not in_buckets)
    for group in ddp.bucket_groups:
        layers = len(group.params) / times.buckets  # in stages
        _Emulated(group, collectives, times.reduction_s * layers, times.gather_s * layers)
    return ddp


class _Emulated:
    """The collectives of a bucket group of Megatron, in time."""

    def __init__(self, group: Any, collectives: Collectives, reduction_s: float, gather_s: float):
        self._group, self._collectives = group, collectives
        self._reduction_s, self._gather_s = reduction_s, gather_s
        self._reduction: Collective | None = None
        self._gather: Collective | None = None
        self._real = {name: getattr(group, name) for name in _COLLECTIVES}
        for name in _COLLECTIVES:
            setattr(group, name, getattr(self, name))

    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        self._real["start_grad_sync"](*args, **kwargs)
        if self._reduction is None:  # Megatron may ask twice in its first step, and launches once
            self._reduction = self._collectives.launch(self._reduction_s)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        self._real["finish_grad_sync"](*args, **kwargs)
        self._wait(self._reduction)
        self._reduction = None

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        self._real["start_param_sync"](*args, **kwargs)
        if self._group.param_gather_handle is not None and self._gather is None:
            self._gather = self._collectives.launch(self._gather_s)

    def finish_param_sync(self, *args: Any, **kwargs: Any) -> None:
        self._real["finish_param_sync"](*args, **kwargs)
        self._wait(self._gather)
        self._gather = None

    def _wait(self, collective: Collective | None) -> None:
        if collective is not None:
            self._collectives.wait(collective)


_COLLECTIVES = ("start_grad_sync", "finish_grad_sync", "start_param_sync", "finish_param_sync")


class ReplicatedStage(PipelineStage):
    """A stage of torch.distributed.pipelining whose module is in torch's DistributedDataParallel.

    torch launches the all-reduce of a bucket as its gradients are there in the last backward of a stage, and waits for all of
    them at the end of that backward. An all-reduce is a reduce-scatter and an all-gather.
    """

    def __init__(self, chunk: EmulatedChunk, *args: Any, times: ReplicaTimes, collectives: Collectives, **kwargs: Any):
        ddp = torch.nn.parallel.DistributedDataParallel(chunk, process_group=parallel_state.get_data_parallel_group())
        super().__init__(ddp, *args, **kwargs)
        self._times, self._collectives = times, collectives
        self._is_last, self._launched = False, list[Collective]()
        for layer in chunk.layers:
            layer.weight.register_post_accumulate_grad_hook(self._launch)

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        self._is_last = last_backward
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        for collective in self._launched:
            self._collectives.wait(collective)
        self._launched.clear()
        return result

    def _launch(self, parameter: torch.Tensor) -> None:
        if self._is_last:
            times = self._times
            self._launched.append(self._collectives.launch((times.reduction_s + times.gather_s) / times.buckets))


def under_fsdp(chunk: EmulatedChunk, times: ReplicaTimes, collectives: Collectives) -> TorchFullyShardedDataParallel:
    """Wrap a chunk in Megatron's wrapper for FSDP2, each layer a unit. Its steps run within `emulated_reductions`."""
    wrapped = TorchFullyShardedDataParallel(
        chunk.config, DistributedDataParallelConfig(), chunk, sub_modules_to_wrap={Layer}
    )
    for layer in chunk.layers:
        _EmulatedGathers(layer, collectives, times.gather_s / times.buckets)
    return wrapped


def emulated_reductions(times: ReplicaTimes, collectives: Collectives) -> AbstractContextManager[None]:
    """Give the models whose first step the runtime runs within this context reductions that take time."""
    return changed(
        fully_sharded, Reductions=partial(EmulatedReductions, collectives, times.reduction_s / times.buckets)
    )


class _EmulatedGathers:
    """The all-gathers of a unit of FSDP2, in time: its next forward or backward waits for the one that is under way."""

    def __init__(self, layer: Any, collectives: Collectives, gather_s: float):
        self._unshard, self._collectives, self._gather_s = layer.unshard, collectives, gather_s
        self._gather: Collective | None = None
        layer.unshard, layer.before_work = self.unshard, self.wait

    def unshard(self, async_op: bool = False) -> Any:
        self._gather = self._collectives.launch(self._gather_s)
        return self._unshard(async_op)

    def wait(self) -> None:
        if self._gather is not None:
            self._collectives.wait(self._gather)
            self._gather = None


class EmulatedReductions(fully_sharded.Reductions):
    """The reduce-scatters of a rank, in time: the compute stream waits for them where the runtime waits.

    As on a GPU that is after the backwards of the next chunk, so that the gradients of at most one chunk wait for their
    reduction beside those being added up.
    """

    def __init__(self, collectives: Collectives, reduction_s: float, context: Any):
        super().__init__(context)
        self._collectives, self._reduction_s = collectives, reduction_s
        self._under_way: deque[Collective] = deque()
        self._of_earlier_chunks = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        super().__call__(*args, **kwargs)
        self._under_way.append(self._collectives.launch(self._reduction_s))

    def begin(self) -> None:
        super().begin()
        self._of_earlier_chunks = len(self._under_way)

    def finish_earlier(self) -> None:
        super().finish_earlier()
        self._wait_for(self._of_earlier_chunks)

    def finish(self) -> None:
        super().finish()
        self._wait_for(len(self._under_way))

    def _wait_for(self, count: int) -> None:
        for _ in range(min(count, len(self._under_way))):
            self._collectives.wait(self._under_way.popleft())


def finish(model: list[Any] | Any, *_: Any, **__: Any) -> None:
    """What Megatron's finalize_model_grads does with the reductions."""
    for chunk in model if isinstance(model, list) else [model]:
        chunk.finish_grad_sync()


def begin(model: list[Any]) -> None:
    """What Megatron's training step does with them before it calls the schedule."""
    for chunk in model:
        chunk.zero_grad_buffer()
        if isinstance(chunk, TorchFullyShardedDataParallel):  # which has no buffer
            chunk.zero_grad()

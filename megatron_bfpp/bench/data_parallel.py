"""The chunks under data parallelism: Megatron's wrappers with emulated collectives. Runs in each rank."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)

from ..integration.seams import changed
from ..runtime import fully_sharded
from .emulate.collectives import Collective, Collectives
from .emulate.stages import EmulatedChunk, Layer


def under_ddp(chunk: EmulatedChunk, collectives: Collectives, in_buckets: bool) -> DistributedDataParallel:
    """Wrap a chunk in Megatron's DistributedDataParallel with its distributed optimizer, everything overlapped.

    in_buckets: a bucket for each layer, which Megatron itself does on the first pipeline rank only.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1,
    )  # fmt: skip
    ddp = DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=not in_buckets)
    costs = collectives.network.case.costs
    for group in ddp.bucket_groups:
        stages = len(group.params) / costs.buckets
        _emulate(group, collectives, costs.reduction * stages, "start_grad_sync", "finish_grad_sync", lambda: True)
        _emulate(group, collectives, costs.gather * stages, "start_param_sync", "finish_param_sync",
                 partial(_is_gathering, group))  # fmt: skip
    return ddp


def _is_gathering(group: Any) -> bool:
    return group.param_gather_handle is not None


def _emulate(
    group: Any, collectives: Collectives, duration_s: float, start: str, finish: str, has_begun: Callable[[], bool]
) -> None:
    """Give the collective of a bucket group, which two of its methods start and finish, its time."""
    real_start, real_finish, under_way = getattr(group, start), getattr(group, finish), list[Collective]()

    def started(*args: Any, **kwargs: Any) -> None:
        real_start(*args, **kwargs)
        if not under_way and has_begun():  # Megatron may ask twice in its first step, and launches once
            under_way.append(collectives.launch(duration_s))

    def finished(*args: Any, **kwargs: Any) -> None:
        real_finish(*args, **kwargs)
        while under_way:
            collectives.wait(under_way.pop())

    setattr(group, start, started)
    setattr(group, finish, finished)


def under_fsdp(chunk: EmulatedChunk, collectives: Collectives) -> TorchFullyShardedDataParallel:
    """Wrap a chunk in Megatron's wrapper for FSDP2, each layer a unit. Its steps run within `emulated_reductions`."""
    wrapped = TorchFullyShardedDataParallel(
        chunk.config, DistributedDataParallelConfig(), chunk, sub_modules_to_wrap={Layer}
    )
    for layer in chunk.layers:
        _EmulatedGathers(layer, collectives)
    return wrapped


def emulated_reductions(collectives: Collectives) -> AbstractContextManager[None]:
    """Give the models whose first step the runtime runs within this context reductions that take time."""
    return changed(fully_sharded, Reductions=partial(EmulatedReductions, collectives))


class _EmulatedGathers:
    """The all-gathers of a unit of FSDP2, in time: its next forward or backward waits for the one that is under way."""

    def __init__(self, layer: Any, collectives: Collectives):
        costs = collectives.network.case.costs
        self._unshard, self._collectives, self._gather_s = layer.unshard, collectives, costs.gather / costs.buckets
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

    def __init__(self, collectives: Collectives, context: Any):
        super().__init__(context)
        costs = collectives.network.case.costs
        self._collectives, self._reduction_s = collectives, costs.reduction / costs.buckets
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
    """Finish the reductions, as Megatron's finalize_model_grads does."""
    for chunk in model if isinstance(model, list) else [model]:
        chunk.finish_grad_sync()


def begin(model: list[Any]) -> None:
    """Clear the gradients, as Megatron's training step does before it calls the schedule."""
    for chunk in model:
        chunk.zero_grad_buffer()
        if isinstance(chunk, TorchFullyShardedDataParallel):  # which has no buffer
            chunk.zero_grad()

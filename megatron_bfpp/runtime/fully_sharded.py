"""Fully sharded data parallelism (torch FSDP2) that a plan drives: it gathers and reduces where the plan says so.

Left to itself FSDP2 gathers a module's parameters before every forward and every backward and reduces its gradients after
every backward: once per micro-batch. Here a chunk is gathered by UNSHARD, stays so until RESHARD, adds up the gradients of
its micro-batches unsharded, and reduces them within its last backward, module by module. FSDP2's own hooks then find
gathered what they would gather. Each chunk is an FSDP root of its own.

Not run on a GPU. What it relies on there, from FSDP2's source (torch 2.14):
  - `unshard(async_op=True)` launches the all-gather behind what the compute stream held at its launch; the first forward or
    backward of the module waits for it and copies out. The chunk's memory is taken from its launch on.
  - A reduce-scatter runs on a stream of its own. FSDP2 keeps the input of one at a time, and the next module's backward
    waits for it. `set_reduce_scatter_max_input_buffers` (torch 2.14) lifts that, over all chunks, which `share_comm_ctx` puts
    on the same streams. Instead a chunk's reduction is waited for when that of the next chunk has been launched: it
    has the next chunk's backwards to hide under, and the unreduced gradients of one chunk are kept beside those being
    added up. Where torch lacks the two, modules wait for each other.
  - FSDP2's root callback waits for all reductions after the last backward. It is held off, and called once at the end of
    the step, so that no backward of the next chunk stands behind the reduction of this one.
On a CPU a collective blocks. There `Reductions` launches it asynchronously, to be waited for at the end of the step; not
with a `sum_dtype`, since FSDP2 casts its result at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import FSDPModule

from ..schedule.ir import Op

# An FSDP module: torch makes the class at run time, of FSDPModule and of the module's own class.
Unit = Any


class Reductions:
    """The reductions of a rank that are under way, in the order of their launch.

    On a CPU it is FSDP2's reduce-scatter too. Results may then be read only after a wait, so nothing may be computed from
    them before: no division after the sum, no cast to another type. Where they are added to an earlier gradient, `waits`
    must be set.
    """

    def __init__(self, context: Any):
        """context: of FSDP2's communication, shared by the chunks; it holds the inputs of reductions, with their events."""
        self.waits = False
        self._context = context
        self._works: deque[dist.Work] = deque()  # on a CPU
        self._earlier = 0, 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any, **_: Any
    ) -> None:
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        self._works.append(getattr(dist, name)(output_tensor, input_tensor, op=op, group=group, async_op=True))
        if self.waits:
            self.finish()

    def begin(self) -> None:
        """What is launched from now on belongs to another chunk."""
        self._earlier = len(self._works), len(self._inputs)

    def finish_earlier(self) -> None:
        """Wait for what was launched before the last `begin`, and let its inputs go."""
        works, inputs = self._earlier
        for _ in range(min(works, len(self._works))):
            self._works.popleft().wait()
        for state in self._inputs[:inputs]:
            if state.event is not None:
                self._context.device_handle.current_stream().wait_event(state.event)
        del self._inputs[:inputs]

    def finish(self) -> None:
        while self._works:
            self._works.popleft().wait()

    @property
    def _inputs(self) -> list[Any]:
        return getattr(self._context, "reduce_scatter_states", [])


_prepared: WeakKeyDictionary[nn.Module, Reductions] = WeakKeyDictionary()  # first chunk of a rank ->


class FullySharded:
    """A context around one step, in which chunks are gathered, resharded and reduced when they are told to.

    model: the chunks of the rank, each an FSDP root (`fully_shard` was called on it last).
    sum_dtype: in which gradients are added up over micro-batches and replicas; None for their own. The reduced gradient
        is of the parameter's.
    average: over the replicas; False for their sum.
    Has the methods of `DataParallel`; for evaluation too, which gathers and reshards.
    """

    def __init__(self, model: list[Unit], sum_dtype: torch.dtype | None = None, average: bool = True):
        self._model = model
        self._units = [list(_units(chunk)) for chunk in model]
        if model[0] not in _prepared:
            _prepared[model[0]] = _prepare(model, self._units, sum_dtype, average)
        self._reductions = _prepared[model[0]]

    def __enter__(self) -> Self:
        self._reductions.waits = any(each.grad is not None for chunk in self._model for each in chunk.parameters())
        for chunk in self._model:
            chunk.set_requires_gradient_sync(False)
            chunk.set_is_last_backward(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        self._reductions.finish()
        for chunk in self._model:
            chunk.set_is_last_backward(True)
            # Waits for the reductions of all chunks and forgets the order of this step's forwards.
            chunk._get_fsdp_state()._root_post_backward_final_callback()

    def before_last_backward(self, chunk: int) -> None:
        """The chunk's next backward is its last of the step: its modules reduce as it passes them."""
        self._model[chunk].set_requires_gradient_sync(True)
        self._reductions.begin()

    def reduce_grad(self, chunk: int) -> None:
        """All backwards of the chunk are done, and have launched its reduction: that of the chunk before must be over."""
        self._model[chunk].set_requires_gradient_sync(False)
        self._reductions.finish_earlier()

    def unshard(self, chunk: int) -> None:
        """Launch the gather of the chunk's parameters. Its forwards and backwards wait for it."""
        for unit in self._units[chunk]:
            unit.unshard(async_op=True)

    def reshard(self, chunk: int) -> None:
        """Free the chunk's gathered parameters; unreduced gradients stay."""
        for unit in self._units[chunk]:
            unit.reshard()

    def waits(self) -> Iterator[tuple[object, str, int, Op]]:
        """The functions that wait for gathers and reductions: owner, name, chunk, and for which of the two."""
        for chunk, units in enumerate(self._units):
            for unit in units:
                for group in unit._get_fsdp_state()._fsdp_param_groups:
                    yield group, "wait_for_unshard", chunk, Op.UNSHARD
            yield self._model[chunk]._get_fsdp_state(), "_root_post_backward_final_callback", chunk, Op.REDUCE_GRAD
        for name in ("finish", "finish_earlier"):
            yield self._reductions, name, 0, Op.REDUCE_GRAD


def _units(chunk: Unit) -> Iterator[Unit]:
    """The modules that FSDP2 gathers and reduces one by one: those with parameters of their own."""
    for module in chunk.modules():
        if isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_groups:
            yield module


def _prepare(model: list[Unit], units: list[list[Unit]], sum_dtype: torch.dtype | None, average: bool) -> Reductions:
    """Set up, once for a model and before its first step, that FSDP2 does nothing of its own accord."""
    if hasattr(fsdp, "share_comm_ctx"):
        fsdp.share_comm_ctx(model)
    reductions = Reductions(model[0]._get_fsdp_state()._comm_ctx)
    for chunk in model:
        chunk.set_reshard_after_forward(False)
        chunk.set_reshard_after_backward(False)
        if hasattr(chunk, "set_reduce_scatter_max_input_buffers"):
            chunk.set_reduce_scatter_max_input_buffers(max(1, sum(map(len, units))))
    for unit in chain.from_iterable(units):
        # Before a backward FSDP2 gathers the module that ran before, also in another chunk. Itself: a gathered one.
        unit.set_modules_to_backward_prefetch([unit])
        if not average:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies before
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            if sum_dtype is not None:
                group.mp_policy = replace(group.mp_policy, reduce_dtype=sum_dtype)
            elif group.device.type == "cpu" and hasattr(unit, "set_custom_reduce_scatter"):
                unit.set_custom_reduce_scatter(reductions)
    for chunk in model:
        # Now, and not in the first forward: what chunks share is made anew by each, which must not happen under way.
        chunk._get_fsdp_state()._lazy_init()
    return reductions

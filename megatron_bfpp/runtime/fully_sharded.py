"""Drives fully sharded data parallelism (torch FSDP2) by a plan: it gathers and reduces where the plan says so.

By itself FSDP2 gathers a module's parameters before every forward and backward and reduces its gradients after every
backward: once per micro-batch. Here a chunk is gathered by UNSHARD, stays gathered until RESHARD, adds up the gradients
of its micro-batches unsharded, and reduces them within its last backward, module by module. FSDP2's own hooks then find
the parameters gathered. Each chunk is an FSDP root of its own.

Not run on a GPU. It relies there on the following, read in FSDP2's source (torch 2.14):
  - `unshard(async_op=True)` launches the all-gather behind the compute stream's work at that moment; the first forward
    or backward of the module waits for it and copies out. The chunk's memory is taken from the launch on.
  - A reduce-scatter runs on a stream of its own. FSDP2 keeps the input of one at a time, and the next module's backward
    waits for it. `set_reduce_scatter_max_input_buffers` (torch 2.14) lifts that over all chunks, which `share_comm_ctx`
    puts on the same streams. Instead this module waits for a chunk's reduction when the next chunk's is launched: the
    reduction can hide under the next chunk's backwards, and one chunk of unreduced gradients stays in memory beside the
    gradients being added up. Where torch lacks the two functions, modules wait for each other.
  - A communicator runs one collective at a time, in order of their launch. The gather of the chunk after the next is
    launched behind a chunk's reductions: these have a communicator of their own where torch has a place for it (2.14).
  - FSDP2's root callback waits for all reductions after the last backward. It is held off and called once at the end of
    the step, so that no backward of the next chunk stands behind the reduction of this one.
On a CPU a collective blocks. There `Reductions` launches it asynchronously and waits at the end of the step.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..schedule.ir import Op

# An FSDP module: torch makes the class at run time, of FSDPModule and of the module's own class.
Unit = Any
NewGroup = Callable[[list[int]], dist.ProcessGroup]


class Reductions:
    """The reductions of a rank that are under way, in the order of their launch.

    On a CPU it also replaces FSDP2's reduce-scatter. Results may then be read only after a wait, so nothing may be
    computed from them before: no division after the sum, no cast. Set `waits` where they are added to an earlier
    gradient.
    """

    def __init__(self, context: Any):
        """context: FSDP2's communication context of all chunks; it holds the inputs of reductions with events."""
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
        """Begin another chunk: reductions launched from here on belong to it."""
        self._earlier = len(self._works), len(self._inputs)

    def finish_earlier(self) -> None:
        """Wait for the reductions launched before the last `begin`, and free their inputs."""
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
    """A context around one step, in which chunks are gathered, resharded and reduced by its methods alone.

    model: the chunks of the rank, each an FSDP root (`fully_shard` was called on it last).
    sum_dtype: the type in which gradients are added up over micro-batches and replicas, and handed over; None for their
        own.
    average: whether gradients are averaged over the replicas; False for their sum.
    new_group: makes a process group of these ranks for the reductions; None: they share that of the gathers.
    It has the methods of `DataParallel`, and serves evaluation too, which gathers and reshards.
    """

    def __init__(
        self, model: list[Unit], sum_dtype: torch.dtype | None = None, average: bool = True,
        new_group: NewGroup | None = None,
    ):  # fmt: skip
        self._model = model
        self._units = [list(_units(chunk)) for chunk in model]
        if model[0] not in _prepared:
            _prepared[model[0]] = _prepare(model, self._units, sum_dtype, average)
            if new_group is not None:
                _separate_reductions(chain.from_iterable(self._units), new_group)
        self._reductions = _prepared[model[0]]
        # Of a split backward: the chunks whose last W reduces, and FSDP2's object of each gathered parameter.
        self._by_hand: set[int] = set()
        self._unsharded: dict[int, Any] = {}

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
        """Have the chunk's next backward, a B that is its last of the step, reduce module by module.

        Before its last W, which launches nothing, it only begins the chunk's reductions.
        """
        self._model[chunk].set_requires_gradient_sync(True)
        self._reductions.begin()

    def before_last_weights(self, chunk: int, owed: Collection[nn.Parameter]) -> None:
        """Note that the chunk's gradients are complete only behind a W: FSDP2's hooks have fired in its last I."""
        self._by_hand.add(chunk)

    def added(self, chunk: int, parameter: nn.Parameter) -> None:
        """Sum the gradient that a W has given to a gathered parameter as FSDP2 does at the end of a backward."""
        if id(parameter) not in self._unsharded:
            params = chain.from_iterable(group.fsdp_params for group in _groups(self._units[chunk]))
            self._unsharded |= {id(each._unsharded_param): each for each in params}
        owner = self._unsharded[id(parameter)]
        owner.accumulate_unsharded_grad_if_needed()
        owner.to_accumulated_grad_if_needed()

    def reduce_grad(self, chunk: int) -> None:
        """End the chunk's backwards, which have launched its reduction, and wait for the reduction before it.

        A W launches none: its chunk is reduced here, in the order of a backward.
        """
        if chunk in self._by_hand:
            self._by_hand.remove(chunk)
            for group in _groups(reversed(self._units[chunk])):
                group.post_backward()
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
        """Yield the functions that wait for gathers and reductions: owner, name, chunk, and UNSHARD or REDUCE_GRAD."""
        for chunk, units in enumerate(self._units):
            for group in _groups(units):
                yield group, "wait_for_unshard", chunk, Op.UNSHARD
            yield self._model[chunk]._get_fsdp_state(), "_root_post_backward_final_callback", chunk, Op.REDUCE_GRAD
        for name in ("finish", "finish_earlier"):
            yield self._reductions, name, 0, Op.REDUCE_GRAD


def _units(chunk: Unit) -> Iterator[Unit]:
    """Yield the modules that FSDP2 gathers and reduces one by one: those with parameters of their own."""
    for module in chunk.modules():
        if isinstance(module, FSDPModule) and module._get_fsdp_state()._fsdp_param_groups:
            yield module


def _groups(units: Iterable[Unit]) -> Iterator[Any]:
    """Yield FSDP2's groups of parameters."""
    for unit in units:
        yield from unit._get_fsdp_state()._fsdp_param_groups


def _distributed(spec: Any, local: torch.Tensor) -> DTensor:
    """Return the distributed tensor of a replica's part, in the type of that part and not of the parameter."""
    return DTensor.from_local(local, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride)


def _separate_reductions(units: Iterable[Unit], new_group: NewGroup) -> None:
    """Give reductions groups of their own, one for the same ranks.

    torch's set_separate_reduce_scatter_group would make one per chunk, and name it by what a process has made before,
    in which the ranks may differ.
    """
    group_of = cache(lambda ranks: new_group(list(ranks)))
    for group in _groups(units):
        if hasattr(group.mesh_info, "reduce_scatter_process_group"):
            ranks = dist.get_process_group_ranks(group.mesh_info.shard_process_group)
            group.mesh_info.reduce_scatter_process_group = group_of(tuple(ranks))


def _prepare(model: list[Unit], units: list[list[Unit]], sum_dtype: torch.dtype | None, average: bool) -> Reductions:
    """Keep FSDP2 from gathering and reducing by itself; once per model, before its first step."""
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
        for group in _groups([unit]):
            for owner in (group, *group.fsdp_params) if sum_dtype is not None else ():
                if hasattr(owner, "mp_policy"):  # each parameter's since torch 2.15
                    owner.mp_policy = replace(owner.mp_policy, reduce_dtype=sum_dtype)
            if group.device.type == "cpu" and hasattr(unit, "set_custom_reduce_scatter"):
                unit.set_custom_reduce_scatter(reductions)
    for chunk in model:
        # Now and not in the first forward: each chunk makes the shared state anew, which must not happen during a step.
        chunk._get_fsdp_state()._lazy_init()
    if sum_dtype is not None:
        # FSDP2 would round the sum to the type of the parameter, which torch no longer asks of a gradient.
        for group in _groups(chain.from_iterable(units)):
            group._orig_dtype = sum_dtype  # read before torch 2.15, then each.sharded_grad_dtype
            group.lazy_init = lambda: None  # which unshard() calls each time, and which would read the type anew
            for each in group.fsdp_params:
                each.sharded_param.grad_dtype = each.sharded_grad_dtype = sum_dtype
                each.to_sharded_dtensor = partial(_distributed, each._sharding_spec)
    return reductions

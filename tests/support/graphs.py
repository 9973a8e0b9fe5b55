"""CUDA graphs on a CPU, with the memory that graphs share on a GPU: Megatron's own cuda_graphs module captures them.

A capture notes every operation of the dispatcher and leaves numbers that mean nothing; a replay runs what was noted
again, on the same memory. The memory of a captured tensor to which nothing refers any more serves the next one, as in
the pool that CUDA's graphs share. So a step that replays in another order than that of the capture, or that sends from
memory which the next graph writes, has other numbers.

A capture refuses what CUDA's refuses: reading a tensor on the host, waiting for the device, giving its memory back,
querying an event (from any thread where CUDA forbids it to all), and also messages and new process groups. It begins by
waiting for the device, and so refuses to begin while a message is pending.
"""

import threading
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bfpp.integration import process

HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class CaptureError(RuntimeError):
    """What ends a capture on a GPU."""


@dataclass(frozen=True)
class Place:
    """A tensor of the graphs' memory, without a reference to it."""

    address: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Memory:
    """The pool of the graphs: blocks that are never given back, and are free once their tensor is gone."""

    def __init__(self) -> None:
        self._blocks: dict[int, Any] = {}  # address -> buffer
        self._owners: dict[int, dict[int, StorageWeakRef]] = defaultdict(dict)  # size of the block -> address ->
        self.reused = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor as `like` in a free block, or in a new one. Its numbers mean nothing."""
        size = like.untyped_storage().nbytes()
        owners = self._owners[size]
        address = next((at for at, owner in owners.items() if owner.expired()), None)
        if address is None:
            block = torch.empty(size, dtype=torch.uint8)  # aligned as torch's own tensors: products keep their bits
            address = block.data_ptr()
            self._blocks[address] = block.numpy()
        else:
            self.reused += 1
        found = self.at(Place(address, like.dtype, like.size(), like.stride(), like.storage_offset()))
        owners[address] = StorageWeakRef(found.untyped_storage())
        if found.is_floating_point():
            found.fill_(float("nan"))
        return found

    def place(self, tensor: torch.Tensor) -> Place | torch.Tensor:
        """Return where a tensor of this memory is, and another tensor as it is: its address stays."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._blocks:
            return tensor.detach()
        return Place(address, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def at(self, place: Place) -> torch.Tensor:
        """Return a tensor with a storage of its own over a block, which keeps the block from nobody."""
        storage = torch.frombuffer(self._blocks[place.address], dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.size, place.stride)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what Transformer Engine's make_weak_ref does: the same memory, without keeping it."""
        place = self.place(tensor)
        return self.at(place) if isinstance(place, Place) else place


def mapped(kind: type, function: Any, value: Any) -> Any:
    """Return the arguments or results of an operation, with those of a kind replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)([mapped(kind, function, each) for each in value])
    return {name: mapped(kind, function, each) for name, each in value.items()} if isinstance(value, dict) else value


class Allocating(TorchDispatchMode):
    """Puts new tensors into the graphs' memory, with their numbers."""

    def __init__(self, memory: Memory):
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return self._memory.take(made).copy_(made)


class Noting(TorchDispatchMode):
    """Notes what is run, for a graph."""

    def __init__(self, memory: Memory, tape: list[tuple[Any, ...]]):
        super().__init__()
        self._memory, self._tape = memory, tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if HOST_READS & set(func.tags) or func.namespace == "c10d":
            raise CaptureError(f"{func} while a graph is captured")
        if func.is_view:
            return func(*args, **kwargs)
        noted = mapped(torch.Tensor, self._memory.place, (args, kwargs))
        if func._schema.is_mutable:  # nothing is computed in a capture: what is outside the graph stays as it is
            self._tape.append((func, *noted, None))
            written = [
                kwargs[each.name] if each.kwarg_only else args[place]
                for place, each in enumerate(func._schema.arguments)
                if each.alias_info is not None and each.alias_info.is_write
            ]
            return written[0] if len(func._schema.returns) == 1 else tuple(written) if func._schema.returns else None
        made = mapped(torch.Tensor, self._memory.take, func(*args, **kwargs))
        self._tape.append((func, *noted, mapped(torch.Tensor, self._memory.place, made)))
        return made


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, graphs: "CpuGraphs"):
        self.tape: list[tuple[Any, ...]] = []
        self.name: tuple[str, int, int] | None = None
        self._graphs = graphs

    def register_generator_state(self, state: Any) -> None: ...

    def replay(self) -> None:
        memory = self._graphs.memory
        self._graphs.replayed[-1].append(self.name)
        with torch.no_grad():
            for func, args, kwargs, made in self.tape:
                found = func(*mapped(Place, memory.at, args), **mapped(Place, memory.at, kwargs))
                if made is not None:  # else it was written in place
                    for place, value in [(made, found)] if isinstance(made, Place) else zip(made, found, strict=True):
                        memory.at(place).copy_(value)


class LayerNorm(torch.autograd.Function):
    """torch's own, but it saves its input where Megatron looks for saved inputs, as Transformer Engine's layers do."""

    @staticmethod
    def forward(ctx, given, shape, weight, bias, eps):
        normalized, mean, reciprocal = torch.native_layer_norm(given, shape, weight, bias, eps)
        ctx.save_for_backward(given, mean, reciprocal, weight, bias)
        ctx.shape = shape
        return normalized

    @staticmethod
    def backward(ctx, gradient):
        given, mean, reciprocal, weight, bias = ctx.saved_tensors
        whole = (gradient, given, ctx.shape, mean, reciprocal, weight, bias, [True] * 3)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(*whole)
        return dx, None, dw, db, None


class CpuGraphs:
    """The graphs of this process. Call `install` when the CPU mode is on; the lists are what a test looks at."""

    def __init__(self) -> None:
        self._mode: tuple[str, int] | None = None  # of the capture that runs, and its thread
        self._allocating: list[Allocating] = []
        self.memory = Memory()
        self.works: list[Any] = []  # handles of messages
        self._forget()

    def _forget(self) -> None:
        self.captured: list[tuple[str, int, int]] = []  # F or B, number of the layer, micro-batch
        self.expected: list[list[tuple[str, int, int]]] = []  # per training step, by the plan of this rank
        self.replayed: list[list[tuple[str, int, int]]] = [[]]  # before the first step, and per training step
        self.eager: list[Counter] = [Counter()]  # likewise, runs of each layer's Python; a step's captures are with it

    def reset(self) -> None:
        """Forget all graphs, for another model."""
        from megatron.core.transformer import cuda_graphs

        cuda_graphs.delete_cuda_graphs()
        # Also after an error, which leaves these as they were.
        cuda_graphs._set_capture_end()
        vars(cuda_graphs).update(fwd_buffer_reuse_ref_count=0, bwd_buffer_reuse_ref_count=0)
        self.works.clear()
        self._forget()

    def install(self) -> None:
        """Replace what a capture needs of CUDA and of Transformer Engine, and note what happens."""
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import cuda_graphs

        cuda = torch.cuda
        cuda.CUDAGraph, cuda.graph = partial(Graph, self), self.capture
        cuda.graph_pool_handle, cuda.memory_stats = lambda: (0, 1), lambda *_: defaultdict(int)
        for owner, name in (
            *((cuda, "synchronize"), (cuda, "empty_cache"), (cuda.Event, "query"), (cuda.Event, "synchronize")),
            *((cuda.Stream, "synchronize"), (dist, "new_group")),
        ):
            setattr(owner, name, self._refusing(name, getattr(owner, name)))
        torch._C._cuda_beginAllocateCurrentThreadToPool = lambda *_: self._allocate()
        torch._C._cuda_endAllocateToPool = lambda *_: self._allocating.pop().__exit__(None, None, None)

        # A CPU's generator has no state that a graph can hold. Dropout is off: a layer draws nothing.
        tracker, fork = random.CudaRNGStatesTracker, random.CudaRNGStatesTracker.fork
        tracker.fork = lambda *args: fork(*args) if self._mode is None else nullcontext()
        random.initialize_rng_tracker = partial(_without_graphs, random.initialize_rng_tracker)
        cuda_graphs.get_cuda_rng_tracker = lambda: SimpleNamespace(is_inference_rng_tracker=True)
        cuda_graphs._ensure_generator_state_is_cudagraph_safe = lambda generator: generator
        cuda.default_generators = (torch.default_generator,) * cuda.device_count()

        vars(cuda_graphs).update(
            HAVE_TE_GRAPHS=True, make_weak_ref=self.memory.alias, TransformerEngineBaseModule=type("Base", (), {}),
            FP8GlobalStateManager=SimpleNamespace(is_fp8_enabled=lambda: False),
            is_fp8_activation_recompute_enabled=lambda: False,
        )  # fmt: skip
        torch.nn.functional.layer_norm = lambda given, shape, *more: LayerNorm.apply(given, list(shape), *more)
        self._watch(cuda_graphs)

    @contextmanager
    def capture(self, graph: Graph, pool: Any = None, capture_error_mode: str = "global"):
        """torch.cuda.graph, which begins with torch.cuda.synchronize()."""
        if not all(work.is_completed() for work in self.works):
            raise CaptureError("a capture waits for the device, where a message is pending")
        if process.ACTIVITY.is_timed:
            raise CaptureError("the watchdog may query events")
        self._mode = capture_error_mode, threading.get_ident()
        try:
            with Noting(self.memory, graph.tape):
                yield
        finally:
            self._mode = None

    def _watch(self, cuda_graphs: Any) -> None:
        from megatron.core.transformer.transformer_layer import TransformerLayer

        from megatron_bfpp.runtime.executor import Executor

        runner, forward, run = cuda_graphs._CudaGraphRunner, TransformerLayer.forward, Executor.run

        def creating(letter: str, name: str, original: Any) -> Any:
            def create(self_: Any, *args: Any, **kwargs: Any) -> None:
                original(self_, *args, **kwargs)
                layer = self_.base_module
                microbatch = layer.cudagraph_manager.cudagraph_runners.index(self_)
                graph = getattr(self_, name)
                graph.name = letter, layer.layer_number, microbatch
                self.captured.append(graph.name)

            return create

        def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
            self.eager[-1][layer.layer_number] += 1
            return forward(layer, *args, **kwargs)

        def running(executor: Any, actions: list[Any]) -> None:
            if not executor.forward_only:
                self.expected.append(_by_layer(executor, actions))
                self.replayed.append([])
                self.eager.append(Counter())
            run(executor, actions)

        runner.create_fwd_graph = creating("F", "fwd_graph", runner.create_fwd_graph)
        runner.create_bwd_graph = creating("B", "bwd_graph", runner.create_bwd_graph)
        TransformerLayer.forward, Executor.run = counted, running

    def _refusing(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._mode is not None and ("global" in self._mode or threading.get_ident() in self._mode):
                raise CaptureError(f"{name} while a graph is captured")
            return original(*args, **kwargs)

        return call

    def _allocate(self) -> None:
        self._allocating.append(Allocating(self.memory))
        self._allocating[-1].__enter__()


def _without_graphs(initialize: Any, *args: Any, use_cudagraphable_rng: bool = False, **kwargs: Any) -> Any:
    return initialize(*(False if at == 2 else each for at, each in enumerate(args)), **kwargs)


def _by_layer(executor: Any, actions: list[Any]) -> list[tuple[str, int, int]]:
    """Return what a plan makes the layers of a rank do, one by one."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    order = []
    for stage, op, microbatch in actions:
        if op.name in "FB":
            chunk = executor.compute._call.model[executor.shape.chunk_of(stage)]
            layers = [layer.layer_number for layer in chunk.modules() if isinstance(layer, TransformerLayer)]
            order += [(op.name, layer, microbatch) for layer in (layers if op.name == "F" else reversed(layers))]
    return order

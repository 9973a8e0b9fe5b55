"""Runs the unmodified Megatron on CPU tensors over gloo: for trying, testing and teaching, not for training.

`enable_cpu` replaces what a machine without a GPU cannot do: tensor factories and moves that name a CUDA device, the
functions of torch.cuda that need a driver, CUDA's random number generator, the compiler, and the optimizer's kernels.
Factories are wrapped one by one, not caught by a TorchFunctionMode: a mode is per thread, is popped while it handles
torch.autograd.backward (hooks and recomputation inside would miss it) and costs every operation, not factories only.

torch.cuda.is_available() stays False: torch itself would call the driver if it were True.
"""

import atexit
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ...console.errors import UserError
from .arguments import cpu_arguments
from .cuda import cuda_patches
from .modules import module_patches
from .optimizer import optimizer_patches

__all__ = [
    "choose_device",
    "cpu_arguments",
    "disable_cpu",
    "enable_cpu",
    "is_cpu_enabled",
    "skip_compile_without_makefile",
]

_MISSING = object()
_undo: list[Callable[[], object]] = []  # what disable_cpu runs, last first; empty means not enabled


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun


def choose_device(requested: str) -> tuple[str, str]:
    """("cuda" or "cpu", a sentence saying why). "auto" is cuda where every rank of this node has a GPU of its own."""
    if requested not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {requested} does not exist.\n  Use --device auto, cuda or cpu.")
    if requested == "cpu":
        return "cpu", "--device cpu was given"
    if requested == "auto" and is_cpu_enabled():  # the device count is one of the things that enable_cpu replaced
        return "cpu", "it was chosen before"
    ranks, devices = _local_world_size(), torch.cuda.device_count()
    numbers = f"{devices} CUDA device(s) for {ranks} rank(s) on this node"
    if devices >= ranks:
        return "cuda", numbers
    if requested == "cuda":
        raise UserError(
            f"--device cuda needs a GPU per rank, but there are {numbers}.\n"
            f"  Start at most {devices} ranks per node (torchrun --nproc-per-node), or use --device cpu."
        )
    return "cpu", numbers


def _set(owner: Any, name: str, value: Any) -> None:
    """Set owner.name to value until disable_cpu. An attribute that a class inherits is deleted again, not copied."""
    previous = vars(owner).get(name, _MISSING)
    _undo.append(lambda: delattr(owner, name) if previous is _MISSING else setattr(owner, name, previous))
    setattr(owner, name, value)


def is_cpu_enabled() -> bool:
    """Whether `enable_cpu` is in effect."""
    return bool(_undo)


def enable_cpu() -> None:
    """Let Megatron run on CPU tensors in this process until `disable_cpu`. Before or after Megatron's import alike."""
    if _undo:
        return
    # First: torch._dynamo reads the torch.cuda functions when it is imported. Eager needs no compiler, and
    # unlike TORCHDYNAMO_DISABLE the stance also reaches functions that are decorated already.
    torch.compiler.set_stance("force_eager")
    _undo.append(lambda: torch.compiler.set_stance("default"))
    _patch_tensors()
    for owner, name, value in cuda_patches(_local_world_size()):
        _set(owner, name, value)
    _patch_random()
    _patch_megatron()
    atexit.register(_close_process_groups)
    _undo.append(lambda: atexit.unregister(_close_process_groups))


def disable_cpu() -> None:
    """Undo `enable_cpu`."""
    while _undo:
        _undo.pop()()


def _close_process_groups() -> None:
    """Join gloo's threads before the interpreter ends, which Megatron leaves to the exit: one that is still busy with a
    Python object then aborts the process. Not after an error, when the peers of a pending operation may be gone.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_exc"):
        torch.distributed.destroy_process_group()


# Tensors

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm"),
    *("scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_NEW = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(device: Any) -> Any:
    """The device to use instead. An int is a CUDA index (torch.cuda.current_device()); "meta" stays."""
    if device is None:
        return None
    return "cpu" if isinstance(device, int) or torch.device(device).type == "cuda" else device


def _factory_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)  # page locking needs the CUDA driver
        return original(*args, **kwargs)

    return factory


def _patch_tensors() -> None:
    """What names a CUDA device and would touch it: `device="cuda"` in every module, `.cuda()`, `.to("cuda")`."""
    for name in _FACTORIES:
        _set(torch, name, _factory_on_cpu(getattr(torch, name)))
    for name in _NEW:
        _set(torch.Tensor, name, _factory_on_cpu(getattr(torch.Tensor, name)))
    to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | int | torch.device):
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and self.is_cpu else answer

    _set(torch.Tensor, "to", to_cpu)
    _set(torch.Tensor, "type", cuda_type)  # the optimizers sort parameters by "torch.cuda.FloatTensor" and the like
    _set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _set(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    _set(torch.Tensor, "record_stream", lambda self, stream: None)


# Random numbers


def _patch_random() -> None:
    """CUDA's generator becomes the CPU's default one, so the states that Megatron forks, saves and loads are real.

    Dropout outside tensor-parallel regions needs equal generators on all tensor-parallel ranks, but a data loader draws
    from the CPU's, and only rank 0 of a tensor-parallel group has one: it must not advance the one generator left.
    """

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    for module in (torch.cuda, torch.cuda.random):
        _set(module, "get_rng_state", get_state)
        _set(module, "set_rng_state", set_state)
        _set(module, "manual_seed", seed)

    from torch.utils.data import DataLoader
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    for owner, name in ((DataLoader, "__iter__"), (_BaseDataLoaderIter, "__next__")):
        _set(owner, name, _keeping_the_generator(getattr(owner, name)))


def _keeping_the_generator(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return original(self)

    return method


# Megatron


def _patch_megatron() -> None:
    """What Megatron itself binds to CUDA. megatron.training is patched where it exists; Megatron-Core is enough."""
    from megatron.core.tensor_parallel import random

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _set(random, "_set_cuda_rng_state", set_state)  # calls torch.cuda.default_generators, empty without a driver
    logger = logging.getLogger(random.__name__)
    logger.addFilter(_not_about_the_generator)
    _undo.append(lambda: logger.removeFilter(_not_about_the_generator))
    for owner, name, value in (*module_patches(), *optimizer_patches()):
        _set(owner, name, value)
    barrier = torch.distributed.barrier

    def barrier_without_devices(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    _set(torch.distributed, "barrier", barrier_without_devices)  # parallel_state passes device_ids: NCCL's only
    isend = torch.distributed.isend

    def isend_keeping_the_data(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return isend(tensor.detach(), *args, **kwargs)

    # 0.17 takes the storage from a tensor (deallocate_output_tensor) while gloo still sends it; later releases wait. A
    # detached tensor keeps the storage. P2POp compares with the name of the second module.
    for module in (torch.distributed, torch.distributed.distributed_c10d):
        _set(module, "isend", isend_keeping_the_data)
    if importlib.util.find_spec("megatron.training") is None:
        return
    from megatron.training import initialize

    original = initialize.initialize_megatron

    def without_cuda(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    for name, module in list(sys.modules.items()):  # bound by `from ... import` in training.py and the package
        if name.startswith("megatron.") and vars(module).get("initialize_megatron") is original:
            _set(module, "initialize_megatron", without_cuda)  # asserts torch.cuda.is_available() otherwise


def _not_about_the_generator(record: logging.LogRecord) -> bool:
    """Not the warning of every fork (0.19) that the CPU's generator moved: here it is the one to move."""
    return "CPU RNG state changed" not in record.getMessage()


def skip_compile_without_makefile() -> None:
    """Let Megatron start where it cannot compile its data-set helpers but a wheel has brought them compiled.

    Rank 0 runs `make -C megatron/core/datasets` at start-up and exits where that fails. A wheel ships the helpers without
    the Makefile. A checkout has the Makefile, which needs pybind11: without it, the helpers of an installed wheel serve.
    """
    from megatron.core import datasets
    from megatron.core.datasets import utils

    folder = os.path.dirname(os.path.abspath(utils.__file__))
    name = "megatron.core.datasets.helpers_cpp"
    if os.path.exists(os.path.join(folder, "Makefile")):
        if importlib.util.find_spec(name) is not None or importlib.util.find_spec("pybind11") is not None:
            return
        datasets.__path__.extend(os.path.join(entry, "megatron", "core", "datasets") for entry in sys.path)
        if importlib.util.find_spec(name) is not None and int(os.environ.get("RANK", "0")) == 0:
            print(
                "megatron_bfpp: no pybind11 to compile the checkout's data-set helpers; using the wheel's", flush=True
            )
    if importlib.util.find_spec(name) is not None:
        utils.compile_helpers = lambda: None  # training/initialize.py imports the name when it calls it

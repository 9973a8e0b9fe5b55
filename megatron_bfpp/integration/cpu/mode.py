"""Run the unmodified Megatron on CPU tensors over gloo: for trying, testing and teaching, not for training.

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
from itertools import chain
from typing import Any

import torch

from ...console.errors import UserError
from .. import seams
from ..relied_on.cpu import INITIALIZE, INITIALIZE_BRIDGE
from ..relied_on.step import COMPILE
from .cuda import communication_patches, cuda_patches
from .modules import module_patches
from .optimizer import optimizer_patches
from .tensors import random_patches, tensor_patches

__all__ = ["CPU", "choose_device", "enable_cpu", "is_cpu_enabled", "skip_compile_without_makefile"]

CPU = "the CPU mode"
HELPERS = "the data-set helpers"


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun


def choose_device(requested: str) -> tuple[str, str]:
    """Return "cuda" or "cpu", and a phrase saying why.

    "auto" is what the environment variable BFPP_DEVICE says. Without it, it is cuda where every rank of this node has
    its own GPU, and the CPU where there is no NVIDIA driver. UserError anywhere else: a rank that quietly joins with
    gloo leaves all others waiting for it.
    """
    said = f"--device {requested}"
    if requested == "auto" and (found := os.environ.get("BFPP_DEVICE")):
        requested, said = found, f"BFPP_DEVICE={found}"
    if requested not in ("auto", "cuda", "cpu"):
        raise UserError(f"{said} does not exist.\n  Use {said.removesuffix(requested)}auto, cuda or cpu.")
    if requested == "cpu":
        return "cpu", f"{said} was given"
    if requested == "auto" and is_cpu_enabled():  # the device count is one of the things that enable_cpu replaced
        return "cpu", "it was chosen before"
    ranks, devices = _local_world_size(), torch.cuda.device_count()
    numbers = f"{devices} CUDA device(s) for {ranks} rank(s) on this node"
    if devices >= ranks:
        return "cuda", numbers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices == 1 and visible and "," not in visible:  # one per rank, as SLURM's --gpus-per-task gives them
        return "cuda", f"{numbers}, which sees only CUDA_VISIBLE_DEVICES={visible}"
    if requested == "auto" and not devices:
        if not _has_driver():
            return "cpu", "there is no NVIDIA driver on this node"
        if visible == "" and not {"RANK", "LOCAL_WORLD_SIZE"} & set(os.environ):
            # A worker of Ray that asked for no GPU, such as one that reads the command line for those that train.
            return "cuda", "the GPUs of this node are hidden from this process, which is no rank"
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    change = f"Start at most {devices} ranks per node (torchrun --nproc-per-node)" if devices else "Look at nvidia-smi"
    raise UserError(f"{said} needs a GPU per rank, but there are {numbers}{shown}.\n  {change}, or use --device cpu.")


def _has_driver() -> bool:
    """Return whether an NVIDIA driver is loaded, working or not; /dev/dxg is that of Windows' Linux."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def is_cpu_enabled() -> bool:
    """Return whether `enable_cpu` is in effect."""
    return seams.is_applied(CPU)


def enable_cpu() -> None:
    """Let Megatron run on CPU tensors until `seams.undo(CPU)`. Before or after Megatron's import alike."""
    if is_cpu_enabled():
        return
    with seams.together(CPU) as undo:
        # First: torch._dynamo reads the torch.cuda functions when it is imported. Eager needs no compiler, and
        # unlike TORCHDYNAMO_DISABLE the stance also reaches functions that are decorated already.
        torch.compiler.set_stance("force_eager")
        undo.callback(torch.compiler.set_stance, "default")
        # A generator each: what it replaces is looked up when the ones before it are done.
        for owner, name, value in chain(
            *(tensor_patches(), cuda_patches(_local_world_size()), random_patches()),
            *(module_patches(), optimizer_patches(), communication_patches()),
        ):
            seams.put(undo, owner, name, value)
        logger = logging.getLogger("megatron.core.tensor_parallel.random")
        logger.addFilter(_is_not_about_the_generator)
        undo.callback(logger.removeFilter, _is_not_about_the_generator)
        for seam in (INITIALIZE, INITIALIZE_BRIDGE):
            undo.callback(seams.undo, seam)
        atexit.register(_close_process_groups)
        undo.callback(atexit.unregister, _close_process_groups)


def apply_to_training() -> None:
    """Let megatron.training start without CUDA, which it asserts otherwise. For the CPU mode; it imports it."""
    seams.apply(INITIALIZE, _without_cuda)


def apply_to_bridge() -> None:
    """Let Megatron-Bridge start without CUDA, likewise."""
    seams.apply(INITIALIZE_BRIDGE, _without_cuda)


def _without_cuda(initialize: Callable[..., Any], *args: Any, **more: Any) -> Any:
    return initialize(*args, **{**more, "allow_no_cuda": True})


def _close_process_groups() -> None:
    """Join gloo's threads before the interpreter ends, which Megatron leaves to the exit.

    A thread that is still busy with a Python object then aborts the process. Not after an error, when the peers of a
    pending operation may be gone.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_exc"):
        torch.distributed.destroy_process_group()


def _is_not_about_the_generator(record: logging.LogRecord) -> bool:
    """Drop the warning of every fork (0.19) that the CPU's generator moved: here it is the one to move."""
    return "CPU RNG state changed" not in record.getMessage()


def skip_compile_without_makefile() -> None:
    """Let Megatron start where it cannot compile its data-set helpers but a wheel has brought them compiled.

    Rank 0 runs `make -C megatron/core/datasets` at start-up and exits where that fails. A wheel ships the helpers
    without the Makefile. A checkout has the Makefile, which needs pybind11: without it, the helpers of an installed
    wheel serve.
    """
    from megatron.core import datasets
    from megatron.core.datasets import utils

    name = "megatron.core.datasets.helpers_cpp"
    is_compiled = importlib.util.find_spec(name) is not None
    is_checkout = os.path.exists(os.path.join(os.path.dirname(os.path.abspath(utils.__file__)), "Makefile"))
    compiles = is_checkout and (is_compiled or importlib.util.find_spec("pybind11") is not None)
    if compiles or seams.is_applied(HELPERS):
        return
    with seams.together(HELPERS) as undo:
        if is_checkout:
            path = list(datasets.__path__)
            datasets.__path__.extend(os.path.join(entry, "megatron", "core", "datasets") for entry in sys.path)
            undo.callback(datasets.__path__.__setitem__, slice(None), path)
            is_compiled = importlib.util.find_spec(name) is not None
            if is_compiled and int(os.environ.get("RANK", "0")) == 0:
                line = "no pybind11 to compile the checkout's data-set helpers; using the wheel's"
                print(f"megatron_bfpp: {line}", flush=True)
        if is_compiled:  # training/initialize.py imports the name when it calls it, Megatron-Bridge at its top
            seams.apply(COMPILE, lambda compile_helpers: None)
            undo.callback(seams.undo, COMPILE)

"""Tensors and random numbers: what names a CUDA device lands on the CPU, and the CPU's generator serves for CUDA's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["random_patches", "tensor_patches"]

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm"),
    *("scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_NEW = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def tensor_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, value) of what would touch CUDA: `device="cuda"` anywhere, `.cuda()`, `.to("cuda")`."""
    for owner, names in ((torch, _FACTORIES), (torch.Tensor, _NEW)):
        for name in names:
            yield owner, name, _factory_on_cpu(getattr(owner, name))
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

    yield torch.Tensor, "to", to_cpu
    yield torch.Tensor, "type", cuda_type  # the optimizers sort parameters by "torch.cuda.FloatTensor" and the like
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self
    yield torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self
    yield torch.Tensor, "record_stream", lambda self, stream: None


def _on_cpu(device: Any) -> Any:
    """Return the device to use instead. An int is a CUDA index (torch.cuda.current_device()); "meta" stays."""
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


def random_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, value) of what makes the CPU's default generator serve for CUDA's.

    The states that Megatron forks, saves and loads are then real. Dropout outside tensor-parallel regions needs equal
    generators on all tensor-parallel ranks, but a data loader draws from the CPU's, and only rank 0 of a
    tensor-parallel group has one: it must not advance the one generator left.
    """
    from megatron.core.tensor_parallel import random
    from torch.utils.data import DataLoader
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    def set_state(new_state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", lambda device="cuda": torch.get_rng_state()
        yield module, "set_rng_state", set_state
        yield module, "manual_seed", seed
    yield random, "_set_cuda_rng_state", set_state  # calls torch.cuda.default_generators, empty without a driver
    for owner, name in ((DataLoader, "__iter__"), (_BaseDataLoaderIter, "__next__")):
        yield owner, name, _keeping_the_generator(getattr(owner, name))


def _keeping_the_generator(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return original(self)

    return method

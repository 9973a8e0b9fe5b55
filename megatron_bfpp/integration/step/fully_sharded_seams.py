"""Changes the places of Megatron that are in the way of --use-torch-fsdp2: two of checkpoints, and its wrapper."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from .. import seams
from ..relied_on.training import LOAD_CHECKPOINT, PARAMETER_IDS, SHARDING_WRAPPER


def apply() -> None:
    """Let every layer be sharded, and sharded optimizers be saved and resumed, until `seams.undo_all`."""
    seams.apply(PARAMETER_IDS, by_local_tensor)
    seams.apply(LOAD_CHECKPOINT, with_steps)
    seams.apply(SHARDING_WRAPPER, with_every_layer)


def with_every_layer(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Run the constructor of the wrapper that shards a chunk, which was made for GPTModel alone.

    It shards transformer layers one by one and leaves others, such as Mamba's, to the chunk as a whole, unless their
    stack names them. And it puts new parameters in the place of a module's own. An object that is no module and was
    given the old ones, as MambaContextParallel is, would compute with those, and their gradients would be lost.
    """
    chunk = inspect.signature(original).bind(self, *args, **kwargs).arguments["module"]
    for stack in chunk.modules():
        kinds = {type(layer) for layer in _layers(stack) if _is_whole(layer)}
        if kinds:
            stack._fsdp_modules = [*getattr(stack, "_fsdp_modules", ()), *kinds]
    held = list(_held_parameters(chunk))
    original(self, *args, **kwargs)
    for holder, names in held:
        kind = type(holder)
        current = {name: property(partial(_parameter, *place)) for name, place in names.items()}
        holder.__class__ = type(kind.__name__, (kind,), current)


def _layers(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    layers = getattr(module, "layers", None)
    return layers if isinstance(layers, torch.nn.ModuleList) else ()


def _is_whole(layer: torch.nn.Module) -> bool:
    """Return whether no part of a layer is sharded by itself: neither a transformer layer nor another stack's."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return not any(isinstance(part, TransformerLayer) or any(_layers(part)) for part in layer.modules())


def _held_parameters(chunk: torch.nn.Module) -> Iterator[tuple[Any, dict[str, tuple[torch.nn.Module, str]]]]:
    """Yield the objects, attributes of modules but no modules, that hold parameters: (module, name) by attribute."""
    places = {
        parameter: (module, name)
        for module in chunk.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for module in chunk.modules():
        for holder in vars(module).values():
            held = {} if isinstance(holder, torch.Tensor) else getattr(holder, "__dict__", {})
            names = {
                name: places[value]
                for name, value in held.items()
                if isinstance(value, torch.nn.Parameter) and value in places
            }
            if names:
                yield holder, names


def _parameter(module: torch.nn.Module, name: str, holder: object) -> torch.nn.Parameter | None:
    return module._parameters[name]


def by_local_tensor(
    original: Callable[..., dict[int, int]], optim_params_iter: Iterable[torch.nn.Parameter]
) -> dict[int, int]:
    """Run get_optim_param_to_id_map, which numbers an optimizer's parameters by the identity of their tensors.

    For a sharded parameter that is the local tensor. Megatron calls `to_local()`, which since torch 2.14 makes a new
    tensor from a parameter: none is found again, and the checkpoint cannot be saved.
    """
    return original(getattr(param, "_local_tensor", param) for param in optim_params_iter)


def with_steps(original: Callable[..., Any], ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run load_checkpoint, which restores only the tensors of a sharded optimizer, in place.

    Without its groups' values the optimizer would count its steps from 0, and Adam would correct its moments for the
    bias of a first step. They are restored here from the state that Megatron has read.
    """
    if not kwargs.get("skip_load_to_model_and_opt") or optimizer is None:
        return original(ddp_model, optimizer, *args, **kwargs)
    with ExitStack() as stack:
        for each in getattr(optimizer, "chained_optimizers", [optimizer]):
            each.load_state_dict = partial(_load_values, each)  # hides the method of the class
            stack.callback(delattr, each, "load_state_dict")
        # The chunks' load_state_dict does nothing: Megatron's wrapper for FSDP2 has it so.
        return original(ddp_model, optimizer, *args, **{**kwargs, "skip_load_to_model_and_opt": False})


def _load_values(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore what a saved optimizer holds beside tensors: its groups' values, and the number of steps."""
    saved = state.get("optimizer", state)  # a bf16 optimizer's state has its fp32 parameters beside it
    own = optimizer.optimizer.param_groups
    for group, found in zip(own, optimizer._filter_and_reorder_param_groups(own, saved["param_groups"]), strict=True):
        group.update({name: value for name, value in found.items() if name != "params"})
    step = saved["state"].get("common_step")  # optimizers that count per parameter have it, such as torch's
    if step is not None:
        for values in optimizer.optimizer.state.values():
            values["step"] = step.clone() if torch.is_tensor(step) else step

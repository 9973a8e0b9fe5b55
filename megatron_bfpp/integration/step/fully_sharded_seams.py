"""Changes the two places of Megatron that block saving and resuming with --use-torch-fsdp2."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from .. import seams
from ..relied_on.training import LOAD_CHECKPOINT, PARAMETER_IDS


def apply_to_checkpoints() -> None:
    """Let sharded optimizers be saved and resumed, until `seams.undo_all`."""
    seams.apply(PARAMETER_IDS, by_local_tensor)
    seams.apply(LOAD_CHECKPOINT, with_steps)


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

"""Changes the three places of Megatron that block --use-torch-fsdp2 with pipeline ranks, or resuming with it."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CodeType
from typing import Any

import torch

from .. import seams
from ..seams import Seam, SeamError

PARAMETER_IDS = Seam("megatron.core.dist_checkpointing.optimizer", "get_optim_param_to_id_map", ("optim_params_iter",))
LOAD_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "load_checkpoint", ("ddp_model", "optimizer", "skip_load_to_model_and_opt")
)


# The assertion


@contextmanager
def pipeline_ranks_allowed(validate: Callable[..., Any]) -> Iterator[None]:
    """Run Megatron's validate_args without its assertion that FSDP2 has no pipeline ranks; every other check stays.

    The assertion is removed from the function's code during the call. Hiding the flag or the number of ranks instead
    would mislead other checks that depend on both.
    """
    function = inspect.unwrap(validate)
    with seams.changed(function, __code__=_without_assertion(function)):
        yield


def _without_assertion(function: Any) -> CodeType:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    removed = _Remove()
    removed.visit(tree)
    if removed.count != 1:
        name = f"{function.__module__}.{function.__qualname__}"
        what = "assertions that --use-torch-fsdp2 has no pipeline ranks"
        raise SeamError(f"{name} has {removed.count} {what}; it should have 1")
    ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)  # tracebacks stay right
    module = compile(tree, inspect.getfile(function), "exec", dont_inherit=True)
    codes = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    return next(code for code in codes if code.co_name == function.__name__)


class _Remove(ast.NodeTransformer):
    """`assert args.pipeline_model_parallel_size == 1` right below `if args.use_torch_fsdp2:` becomes `pass`."""

    count = 0

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.test) == "args.use_torch_fsdp2":
            for index, statement in enumerate(node.body):
                test = ast.unparse(statement.test) if isinstance(statement, ast.Assert) else ""
                if test == "args.pipeline_model_parallel_size == 1":
                    node.body[index] = ast.copy_location(ast.Pass(), statement)
                    self.count += 1
        return node


# Checkpoints


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

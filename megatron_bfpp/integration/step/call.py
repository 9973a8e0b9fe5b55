"""What a call of the schedule must look like: checked before any rank waits for another."""

from __future__ import annotations

from typing import Any

import torch


class CallError(ValueError, RuntimeError):
    """A call that the schedule refuses. Also a RuntimeError: Megatron's schedules refuse calls with one, and callers catch it."""


def check_call(call: dict[str, Any]) -> None:
    """What would leave other ranks waiting is found before any rank waits."""
    model, iterators = call["model"], call["data_iterator"]
    if not isinstance(model, list) or not all(isinstance(chunk, torch.nn.Module) for chunk in model):
        raise CallError("model must be a list with the model chunks of this rank")
    if not isinstance(iterators, list) or len(iterators) != len(model):
        given = len(iterators) if isinstance(iterators, list) else f"a {type(iterators).__name__}"
        raise CallError(
            f"data_iterator must be a list with one per model chunk: {len(model)} chunks, but {given} given"
        )
    if call["adjust_tensor_shapes_fn"] is not None:
        raise CallError("adjust_tensor_shapes_fn does not work with model chunks: Megatron has it for 1F1B only")


def check_config(config: Any) -> None:
    """The same refusals as on the command line, for configurations that did not come from one."""
    if config.overlap_moe_expert_parallel_comm:
        raise ValueError("overlap_moe_expert_parallel_comm does not work with breadth-first: it is a 1F1B schedule")
    if getattr(config, "cuda_graph_impl", "none") not in ("none", None):
        raise ValueError(f"cuda_graph_impl={config.cuda_graph_impl} does not work with breadth-first: set it to none")

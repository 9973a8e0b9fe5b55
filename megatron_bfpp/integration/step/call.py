"""The call of Megatron's interleaved schedule as one value, checked before any rank waits for another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection


class CallError(ValueError, RuntimeError):
    """A call that the schedule refuses.

    It is a RuntimeError too, since Megatron's schedules refuse calls with one and callers catch it.
    """


@dataclass(slots=True, kw_only=True)
class StepCall:
    """The arguments of forward_backward_pipelining_with_interleaving (schedules.py, 0.17 to 0.19), with its defaults.

    CallError where they would leave other ranks waiting.
    """

    forward_step_func: Callable[..., Any]
    data_iterator: list[Any]  # one per model chunk
    model: list[torch.nn.Module]  # the model chunks of this rank
    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    decoder_seq_length: int | None = None
    forward_only: bool = False  # an evaluation step
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None
    p2p_communicator: P2PCommunicator | None = None
    pg_collection: ProcessGroupCollection | None = None
    force_all_reduce: bool = False

    def __post_init__(self) -> None:
        model, iterators = self.model, self.data_iterator
        if not isinstance(model, list) or not all(isinstance(chunk, torch.nn.Module) for chunk in model):
            raise CallError("model must be a list with the model chunks of this rank")
        if not isinstance(iterators, list) or len(iterators) != len(model):
            given = len(iterators) if isinstance(iterators, list) else f"a {type(iterators).__name__}"
            raise CallError(
                f"data_iterator must be a list with one per model chunk: {len(model)} chunks, but {given} given"
            )
        if self.adjust_tensor_shapes_fn is not None:
            raise CallError("adjust_tensor_shapes_fn does not work with model chunks: Megatron has it for 1F1B only")

    def tensor_shape(self, config: Any, groups: ProcessGroupCollection) -> tuple[int, int, int]:
        """Return the shape of a message: [sequence / cp (/ tp with sequence parallelism), micro-batch, hidden]."""
        sequence = self.seq_length // groups.cp.size()
        if config.sequence_parallel:
            sequence //= groups.tp.size()
        return sequence, self.micro_batch_size, config.hidden_size


def check_config(config: Any) -> None:
    """Refuse what the command line refuses, for configurations that did not come from one."""
    if config.overlap_moe_expert_parallel_comm:
        raise ValueError("overlap_moe_expert_parallel_comm does not work with breadth-first: it is a 1F1B schedule")
    graphs = getattr(config, "cuda_graph_impl", None) or "none"
    if graphs != "none" and (graphs != "local" or not hasattr(config, "cuda_graph_modules")):
        raise ValueError(
            f"cuda_graph_impl={graphs} does not work with breadth-first: set it to none, or from megatron-core 0.18 on "
            "to local"
        )

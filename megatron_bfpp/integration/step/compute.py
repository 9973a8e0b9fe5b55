"""Megatron's forward and backward of one micro-batch, as the executor calls them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch.nn import Parameter

from ...runtime.weight_gradients import OwedGradients
from . import cuda_graphs
from .call import StepCall


class MegatronCompute:
    """Megatron's forward_step and backward_step for one step of this rank. One object per step.

    cp_size: context-parallel ranks. max_outstanding: the most forwards of this rank that await their backward.
    owed: the weights' gradients of split backwards; None where none is split. before_last: called before the last of
    a chunk are computed, with the chunk and the weights that they belong to.
    """

    def __init__(
        self, call: StepCall, config: Any, is_last_rank: bool, cp_size: int, device: torch.device,
        max_outstanding: int, owed: OwedGradients | None, before_last: Callable[[int, list[Parameter]], None],
    ):  # fmt: skip
        self.store: list[Any] = []  # what the loss function reports, on the last stage
        self.total_num_tokens = torch.zeros([], dtype=torch.int, device=device)
        self._call, self._config, self._max_outstanding = call, config, max_outstanding
        self._owed, self._before_last = owed, before_last
        self._last_chunk = len(call.model) - 1 if is_last_rank else None  # the chunk that ends with the loss
        self._partial = config.num_microbatches_with_partial_activation_checkpoints
        self._has_graphs = cuda_graphs.are_used(config) and not call.forward_only
        self._forwards = 0
        self._forward_step = partial(
            schedules.forward_step, call.forward_step_func, num_microbatches=call.num_microbatches,
            forward_data_store=self.store, config=config, cp_group_size=cp_size,
            collect_non_loss_data=call.collect_non_loss_data,
        )  # fmt: skip

    def forward(self, chunk: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        """Return the output of a chunk, or the loss on the last stage."""
        call = self._call
        if self._has_graphs:
            cuda_graphs.before_forward(call.model[chunk])
        output: torch.Tensor
        output, num_tokens = self._forward_step(
            call.data_iterator[chunk], call.model[chunk], input_tensor=received,
            checkpoint_activations_microbatch=self._checkpoints_all_layers(),
            is_first_microbatch=schedules.check_first_val_step(
                first_val_step=call.first_val_step, forward_only=call.forward_only, cond=microbatch == 0
            ),
            current_microbatch=microbatch, vp_stage=chunk, is_last_stage=chunk == self._last_chunk,
        )  # fmt: skip
        self.total_num_tokens += num_tokens
        self._forwards += 1
        return cuda_graphs.output_of(output) if self._has_graphs and chunk != self._last_chunk else output

    def backward(
        self, received: torch.Tensor | None, output: torch.Tensor, grad: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the gradient of `received`."""
        input_grad: torch.Tensor | None = schedules.backward_step(
            input_tensor=received, output_tensor=output, output_tensor_grad=grad, config=self._config
        )
        return input_grad

    def input_gradient(
        self, chunk: int, microbatch: int, received: torch.Tensor | None, output: torch.Tensor,
        grad: torch.Tensor | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the gradient of `received`; those of linear layers' weights are owed."""
        assert self._owed is not None, "a plan with an I has a place for what it owes"
        with self._owed.deferring(chunk, microbatch):
            return self.backward(received, output, grad)

    def weight_gradients(self, chunk: int, microbatch: int) -> None:
        """Compute what the `input_gradient` of this chunk and microbatch owes."""
        assert self._owed is not None, "a plan with a W has a place for what it pays"
        if microbatch == self._call.num_microbatches - 1:
            self._before_last(chunk, self._owed.weights(chunk, microbatch))
        self._owed.pay(chunk, microbatch)

    def release(self, output: torch.Tensor) -> None:
        """Free the data of a sent output; its graph stays."""
        schedules.deallocate_output_tensor(
            out=output, deallocate_pipeline_outputs=self._config.deallocate_pipeline_outputs
        )

    def _checkpoints_all_layers(self) -> bool | None:
        """Apply Megatron's window of partial checkpointing (arXiv 2205.05198, appendix C); None without it."""
        return None if self._partial is None else self._forwards % self._max_outstanding >= self._partial

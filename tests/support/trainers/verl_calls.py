"""verl's calls in verl's order. Read at volcengine/verl 1dda039b (2026-08).

verl/workers/engine/megatron/transformer_impl.py (MegatronEngine), verl/utils/megatron_utils.py, verl/workers/engine/
{base,utils}.py and verl/utils/megatron/pipeline_parallel.py. There is no command line of Megatron: V is
actor.megatron.virtual_pipeline_model_parallel_size, and the config comes from a bridge. Sizes of messages are never
given (seq_length=1, micro_batch_size=1). Actor and reference are two engines of one process over the same groups; the
reference has no optimizer and no wrapper. Parameters, gradients and the optimizer's state are given up between calls.

variants: "" keeps them; "offload" empties the storages of parameters and gradients between calls; "tokens" normalizes
by tokens, as verl does with context parallelism; "save" writes a checkpoint at the end, and "load" starts from it.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .tiny import (
    Job,
    Record,
    chunks_of,
    load,
    log_probabilities,
    microbatch,
    optimizer_of,
    packed,
    policy_loss,
    save,
    transformer_config,
    wrapped,
)

DTYPE = torch.bfloat16
# dist_ckpt_optim_fully_reshardable=True
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def main(job: Job) -> None:
    """Run the job in this rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    import megatron_bfpp

    megatron_bfpp.enable(job.schedule, device="cpu")  # after the trainer has imported the chooser by name
    dist.init_process_group("cpu:gloo,cuda:nccl")  # as there; the CPU mode starts gloo
    actor = Engine(job, get_forward_backward_func, forward_only=False)
    reference = Engine(job, get_forward_backward_func, forward_only=True)
    if job.variant == "load":
        load(job.folder / "saved", actor.module, actor.optimizer, **RESHARDABLE)
        load(job.folder / "saved", reference.module)
    with torch.no_grad():
        for chunk in reference.module:
            for each in chunk.parameters():
                each.mul_(0.9)
    record = Record(job)
    for rollout, counts in enumerate(job.rollouts):
        time.sleep(job.pause_s)  # vLLM generates
        for step, count in enumerate(counts):
            batch = batch_of(rollout, step, count)
            for name, engine in (("ref_log_probs", reference), ("old_log_probs", actor)):
                found = engine.infer_batch(batch)
                if found:
                    record.add(name, found["log_probs"])
                    for row, log_probs in zip(batch, found["log_probs"]):
                        row[name] = log_probs
            found = actor.train_batch(batch, loss_function)
            record.add("losses", found.get("loss", []))
            record.add("grad norm", found["grad_norm"])
    actor.to_device()
    record.write(actor.module)
    if job.variant == "save":
        save(job.folder / "saved", actor.module, actor.optimizer, **RESHARDABLE)


def batch_of(rollout: int, step: int, count: int) -> list[dict[str, Any]]:
    """Return the micro-batches of this replica."""
    from megatron.core import mpu

    replica = mpu.get_data_parallel_rank()
    return [{"tokens": microbatch(rollout, step, replica, each)} for each in range(count)]


def loss_function(log_probs: list[torch.Tensor], row: dict[str, Any]) -> torch.Tensor:
    old, reference = (row[name].split(row["lengths"]) for name in ("old_log_probs", "ref_log_probs"))
    return policy_loss(log_probs, old, reference, advantage=0.5)


class Engine:
    """MegatronEngine: one model of the process."""

    def __init__(self, job: Job, chooser: Callable[[], Callable[..., Any]], forward_only: bool):
        from megatron.core import mpu
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        self.chooser, self.variant, self.forward_only = chooser, job.variant, forward_only
        if not mpu.is_initialized():  # the second engine finds the groups of the first
            mpu.initialize_model_parallel(
                pipeline_model_parallel_size=job.pp, virtual_pipeline_model_parallel_size=job.chunks, use_sharp=False,
                context_parallel_size=1, expert_model_parallel_size=1, nccl_communicator_config_path=None,
            )  # fmt: skip
        torch.manual_seed(42)
        model_parallel_cuda_manual_seed(42)
        self.config = transformer_config(job.pp, job.chunks, DTYPE)
        self.config.calculate_per_token_loss = job.variant == "tokens"
        self.module: list[Any] = chunks_of(self.config, job.chunks)
        if not forward_only:
            self.module = wrapped(
                self.config, self.module, use_distributed_optimizer=True, grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
            )  # fmt: skip
            self.optimizer = optimizer_of(self.module, DTYPE, is_distributed=True)
            self._register_hooks()
        self.kept: list[tuple[Any, torch.Tensor, int]] = []
        self.to_cpu()

    def _register_hooks(self) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.utils import get_model_config

        for chunk in self.module:
            config = get_model_config(chunk)
            config.grad_scale_func = self.optimizer.scale_loss
            config.finalize_model_grads_func = finalize_model_grads

    def to_cpu(self) -> None:
        """Give up the storages of parameters and gradients."""
        if self.variant != "offload" or self.forward_only:
            return
        for chunk in self.module:
            for buffer in chunk.buffers:
                self.kept.append((buffer, buffer.param_data.clone(), buffer.grad_data.untyped_storage().size()))
                buffer.param_data.untyped_storage().resize_(0)
                buffer.grad_data.untyped_storage().resize_(0)

    @torch.no_grad()
    def to_device(self) -> None:
        """Take them back; gradients are zero."""
        for buffer, values, gradient_bytes in self.kept:
            buffer.param_data.untyped_storage().resize_(values.untyped_storage().size())
            buffer.param_data.copy_(values)
            buffer.grad_data.untyped_storage().resize_(gradient_bytes)
            buffer.grad_data.zero_()
        self.kept = []

    def infer_batch(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the log-probabilities per micro-batch on the last stage, nothing elsewhere."""
        self.to_device()
        for chunk in self.module:
            chunk.eval()
        with torch.no_grad():
            found = self.forward_backward_batch(batch, None, forward_only=True)
        self.to_cpu()
        return found

    def train_batch(self, batch: list[dict[str, Any]], loss: Callable[..., torch.Tensor]) -> dict[str, Any]:
        """Return losses on the last stage, and the gradient's norm."""
        self.to_device()
        for chunk in self.module:
            chunk.train()
        self.optimizer.zero_grad()
        for chunk in self.module:
            chunk.zero_grad_buffer()
        found = self.forward_backward_batch(batch, loss, forward_only=False)
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        self.optimizer.zero_grad()
        for chunk in self.module:
            chunk.zero_grad_buffer()
        self.to_cpu()
        return {**found, "grad_norm": norm}

    def forward_backward_batch(
        self, batch: list[dict[str, Any]], loss: Callable[..., torch.Tensor] | None, forward_only: bool
    ) -> dict[str, Any]:
        from megatron.core import mpu

        micro_batches = [{**row, "lengths": [len(each) - 1 for each in row["tokens"]]} for row in batch]
        finish = partial(self._postprocess, forward_only=forward_only, loss=loss, count=len(micro_batches))
        iterators = [iter(each) for each in [micro_batches] * len(self.module)]
        found = self.chooser()(
            forward_step_func=partial(self._forward_step, finish=finish), data_iterator=iterators, model=self.module,
            num_microbatches=len(micro_batches), seq_length=1, micro_batch_size=1, forward_only=forward_only,
        )  # fmt: skip
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return {}
        return {
            "loss": [each["loss"] for each in found],
            "log_probs": [torch.cat(each["model_output"]) for each in found],
        }

    def _forward_step(self, iterator: Iterator[dict[str, Any]], model: Any, finish: Callable[..., Any]) -> Any:
        row = next(iterator)
        tokens, parameters = packed(row["tokens"], multiple=1)
        output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=parameters)
        return output, partial(finish, row=row)

    def _postprocess(
        self, logits: torch.Tensor, row: dict[str, Any], forward_only: bool, loss: Callable[..., Any] | None, count: int
    ) -> Any:
        log_probs = log_probabilities(logits, row["tokens"])
        value = torch.tensor(1.0) if loss is None else loss(log_probs, row)
        report = {"loss": value.detach().item(), "model_output": [each.detach() for each in log_probs]}
        if self.config.calculate_per_token_loss and loss is not None:
            tokens = sum(len(each) for each in row["tokens"])
            return value * tokens, torch.tensor(tokens, dtype=torch.int), report
        return value if loss is None else value * count, report

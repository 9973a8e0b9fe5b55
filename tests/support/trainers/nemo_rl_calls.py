"""NeMo-RL's calls in NeMo-RL's order. Read at NVIDIA-NeMo/RL 7ea279ab (2026-08).

Two things are otherwise than there, without which it has no model chunks: its set-up keeps the first chunk only
(nemo_rl/models/megatron/setup.py, `model = model[0]`), and gives the schedule one iterator (data.py,
get_microbatch_iterator); here the list is kept, and each chunk has an iterator. The rest is the order of
nemo_rl/models/policy/workers/megatron_policy_worker.py (train, get_logprobs, use_reference_model) and
nemo_rl/models/megatron/train.py (megatron_forward_backward): Bridge's set-up, the chooser asked at each call,
log-probabilities of the policy and of the reference, whose weights are swapped into the same model, then a step.
"""

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .tiny import (
    Job,
    Record,
    chunks_of,
    log_probabilities,
    microbatch,
    optimizer_of,
    packed,
    policy_loss,
    transformer_config,
    wrapped,
)


def main(job: Job) -> None:
    """Run the job in this rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401 - bound before, as there

    import megatron_bfpp

    megatron_bfpp.enable(job.schedule, device="cpu")
    Worker(job).run()


class Worker:
    """MegatronPolicyWorker: what each rank holds."""

    def __init__(self, job: Job):
        from megatron.core import mpu
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        self.job, self.record = job, Record(job)
        dist.init_process_group("nccl")  # as there; the CPU mode starts gloo
        mpu.initialize_model_parallel(1, job.pp, job.chunks)
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config = transformer_config(job.pp, job.chunks, torch.bfloat16)
        self.model = wrapped(
            config, chunks_of(config, job.chunks), use_distributed_optimizer=True, overlap_grad_reduce=True
        )
        self.optimizer = optimizer_of(self.model, torch.bfloat16, is_distributed=True)
        # megatron/bridge/training/setup.py, _update_model_config_funcs
        config.grad_scale_func, config.finalize_model_grads_func = self.optimizer.scale_loss, finalize_model_grads
        config.no_sync_func = [each.no_sync for each in self.model]
        config.grad_sync_func = [each.start_grad_sync for each in self.model]
        with torch.no_grad():
            self.reference = [0.9 * each for each in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        return [each for chunk in self.model for each in chunk.parameters()]

    def run(self) -> None:
        """Generate, score by both models, train."""
        from megatron.core import mpu

        replica = mpu.get_data_parallel_rank()
        for number, counts in enumerate(self.job.rollouts):
            time.sleep(self.job.pause_s)  # vLLM generates
            data = [microbatch(number, replica, each) for each in range(sum(counts))]
            old = self._logprobs(data)
            reference = self._reference_logprobs(data)
            self.record.add("log_probs", [each for batch in old for each in batch])
            self.record.add("ref_log_probs", [each for batch in reference for each in batch])
            if not mpu.is_pipeline_last_stage():
                old = reference = [None] * len(data)
            first = 0
            for count in counts:  # of a global batch each
                last = first + count
                self._train([*zip(data[first:last], old[first:last], reference[first:last])])
                first = last
        self.record.write(self.model)

    def _reference_logprobs(self, data: list[Any]) -> list[list[torch.Tensor]]:
        with torch.no_grad():
            mine = [each.clone() for each in self._weights()]
            for each, theirs in zip(self._weights(), self.reference):
                each.copy_(theirs)
            scored = self._logprobs(data)
            for each, kept in zip(self._weights(), mine):
                each.copy_(kept)
        return scored

    def _logprobs(self, data: list[Any]) -> list[list[torch.Tensor]]:
        def collect(sequences: Any, logits: torch.Tensor) -> Any:
            return logits.new_zeros(()), {"logprobs": log_probabilities(logits, sequences)}

        with torch.no_grad():
            for chunk in self.model:
                chunk.eval()
            found = self._forward_backward([(each,) for each in data], collect, forward_only=True)
            for chunk in self.model:
                chunk.train()
        return [each["logprobs"] for each in found]

    def _train(self, batches: list[Any]) -> None:
        def loss(sequences: Any, old: Any, reference: Any, logits: torch.Tensor) -> Any:
            value = policy_loss(log_probabilities(logits, sequences), old, reference, advantage=0.5)
            # Megatron divides by the number of micro-batches; NeMo-RL's losses are normalized over all tokens.
            return value * len(batches), {"loss": value.detach()}

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._forward_backward(batches, loss, forward_only=False)
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        self.record.add("losses", [each["loss"] for each in reports])
        self.record.add("grad norm", norm)

    def _forward_backward(self, batches: list[Any], process: Any, forward_only: bool) -> list[Any]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: Any, model: Any) -> Any:
            batch = next(iterator)
            tokens, parameters = packed(batch[0])
            output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=parameters)
            return output, partial(process, *batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(batches) for _ in self.model], model=self.model,
            num_microbatches=len(batches), seq_length=64, micro_batch_size=1, decoder_seq_length=64,
            forward_only=forward_only,
        )  # fmt: skip

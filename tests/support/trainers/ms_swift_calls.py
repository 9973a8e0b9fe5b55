"""ms-swift's calls in ms-swift's order. Read at modelscope/ms-swift 3602360a and mcore-bridge f020e479 (2026-08).

Its arguments are its own (swift/megatron/arguments/megatron_args.py): megatron.training is not imported. Groups:
swift/megatron/utils/megatron_lm_utils.py, _initialize_mpu; chunks: mcore_bridge/model/register.py, get_mcore_model; the
loop: swift/megatron/trainers/base.py, setup_model_training, run_train_step, train_step, evaluate. Micro-batches without
padding are packed sequences of any length; the loss is a sum with its number of tokens. An evaluation uses the same
call with forward_only.

variants: "" trains all parameters, with overlapped reductions and gathers; "lora" trains adapters of frozen layers;
"dpo" (trainers/dpo_trainer.py) runs the reference inside the policy's forward step, so that each message between stages
carries both, the reference's half without a gradient.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .tiny import Job, Record, chunks_of, microbatch, optimizer_of, packed, transformer_config, wrapped

RANK = 4  # of an adapter


class Lora(torch.nn.Module):
    """A linear layer of Megatron with the adapter that peft puts around it."""

    def __init__(self, base: Any):
        super().__init__()
        self.base = base
        out, into = base.weight.shape
        like = {"dtype": base.weight.dtype}
        self.down = torch.nn.Parameter(0.1 * torch.randn(RANK, into, **like))
        self.up = torch.nn.Parameter(0.1 * torch.randn(out, RANK, **like))

    def forward(self, hidden: torch.Tensor) -> Any:
        output, bias = self.base(hidden)
        return output + hidden @ self.down.T @ self.up.T, bias


def main(job: Job) -> None:
    """Run the job in this rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401 - bound before, as there

    import megatron_bfpp

    megatron_bfpp.enable(job.schedule, device="cpu")
    Trainer(job).run()


class Trainer:
    """MegatronTrainer and, as a variant, MegatronDPOTrainer: what each rank holds."""

    def __init__(self, job: Job):
        from megatron.core import mpu
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        self.job, self.record = job, Record(job)
        dist.init_process_group("nccl")  # as there; the CPU mode starts gloo
        mpu.initialize_model_parallel(1, job.pp, job.chunks, context_parallel_size=1, distributed_timeout_minutes=2)
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        self._prepare_model()
        self.optimizer = optimizer_of(self.wrapped, torch.bfloat16, is_distributed=True)
        self._setup()

    def _prepare_model(self) -> None:
        self.config = transformer_config(self.job.pp, self.job.chunks, torch.bfloat16)
        self.config.calculate_per_token_loss = self.job.variant != "dpo"
        models = chunks_of(self.config, self.job.chunks)
        self.references = []
        if self.job.variant == "dpo":
            self.references = [each.module.eval().requires_grad_(False) for each in chunks_of(self.config, len(models))]
        if self.job.variant == "lora":
            for model in models:
                model.requires_grad_(False)
                for layer in model.module.decoder.layers:
                    layer.self_attention.linear_qkv = Lora(layer.self_attention.linear_qkv)
                    layer.self_attention.linear_proj = Lora(layer.self_attention.linear_proj)
        self.overlaps = self.job.variant != "lora"
        self.wrapped = wrapped(
            self.config, models, use_distributed_optimizer=True, overlap_grad_reduce=self.overlaps,
            overlap_param_gather=self.overlaps,
        )  # fmt: skip

    def _setup(self) -> None:
        from megatron.core.distributed import finalize_model_grads

        config = self.config
        for model in self.wrapped:
            model.train()
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        self.gathers: Any = None
        if self.overlaps:
            config.no_sync_func = [each.no_sync for each in self.wrapped]
            config.grad_sync_func = [each.start_grad_sync for each in self.wrapped]
            self.gathers = [each.start_param_sync for each in self.wrapped]  # set after the first step
            for each in self.wrapped:
                each.disable_forward_pre_hook(param_sync=False)

    def run(self) -> None:
        """Train and evaluate, with the number of micro-batches of each step."""
        from megatron.core import mpu

        replica, first = mpu.get_data_parallel_rank(), True
        for number, counts in enumerate(self.job.rollouts):
            data = [microbatch(number, replica, each) for each in range(sum(counts))]
            iterators = [iter(data) for _ in self.wrapped]
            for count in counts:
                self._train_step(iterators, count)
                if first and self.overlaps:
                    self._hooks(enabled=True)
                first = False
            self._hooks(enabled=False)
            self._evaluate([iter(data) for _ in self.wrapped], counts[0])
            self._hooks(enabled=True)
        self._hooks(enabled=False)
        self.record.write(self.wrapped)

    def _hooks(self, enabled: bool) -> None:
        if self.overlaps:
            for each in self.wrapped:
                each.enable_forward_pre_hook() if enabled else each.disable_forward_pre_hook()
            self.config.param_sync_func = self.gathers if enabled else None

    def _train_step(self, iterators: list[Any], count: int) -> None:
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._call(iterators, count, forward_only=False)
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        self.record.add("losses", metrics)
        self.record.add("grad norm", norm)

    def _evaluate(self, iterators: list[Any], count: int) -> None:
        for model in self.wrapped:
            model.eval()
        with torch.no_grad():
            self.record.add("evaluation", self._call(iterators, count, forward_only=True))
        for model in self.wrapped:
            model.train()

    def _call(self, iterators: list[Any], count: int, forward_only: bool) -> list[torch.Tensor]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        step = self._dpo_step if self.job.variant == "dpo" else self._step
        reports = get_forward_backward_func()(
            forward_step_func=step, data_iterator=iterators, model=self.wrapped, num_microbatches=count,
            seq_length=64, micro_batch_size=1, forward_only=forward_only,
        )  # fmt: skip
        return [each["loss"] for each in reports]

    def _batch(self, iterator: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        tokens, parameters = packed(next(iterator))
        labels = torch.roll(tokens, -1, dims=-1)
        return tokens, labels, {"position_ids": None, "attention_mask": None, "packed_seq_params": parameters}

    def _labels(self, model: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor | None:
        return labels if model.post_process else None

    def _step(self, iterator: Any, model: Any) -> Any:
        tokens, labels, rest = self._batch(iterator)
        inner = model.module.module
        return model(input_ids=tokens, labels=self._labels(inner, labels), **rest), partial(self._loss, labels)

    def _loss(self, labels: torch.Tensor, output: torch.Tensor) -> Any:
        from megatron.core import mpu

        losses, mask = output.float(), labels > 0
        loss = torch.stack([(losses * mask).sum(), mask.sum()])
        report = loss.detach().clone()
        dist.all_reduce(report, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return loss[0].clone(), loss[1].detach().to(torch.int), {"loss": report}

    def _dpo_step(self, iterator: Any, model: Any) -> Any:
        tokens, labels, rest = self._batch(iterator)
        inner = model.module.module
        received = inner.decoder.input_tensor
        reference = self.references[inner.vp_stage]
        labels_here = self._labels(inner, labels)
        with torch.no_grad():
            if received is not None:
                reference.set_input_tensor(received[: received.shape[0] // 2].detach())
            theirs = reference(input_ids=tokens, labels=labels_here, **rest)
        if received is not None:
            inner.set_input_tensor(received[received.shape[0] // 2 :])
        mine = model(input_ids=tokens, labels=labels_here, **rest)
        return torch.concat([theirs, mine]), partial(self._dpo_loss, labels)

    def _dpo_loss(self, labels: torch.Tensor, output: torch.Tensor) -> Any:
        theirs, mine = output[:1].detach().float(), output[1:].float()
        loss = -torch.nn.functional.logsigmoid(0.1 * ((theirs - mine) * (labels > 0)).sum())
        return loss, {"loss": loss.detach().clone()}

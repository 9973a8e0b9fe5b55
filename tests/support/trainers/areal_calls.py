"""AReaL's calls in AReaL's order. Read at inclusionAI/AReaL 4aef98d8 (2026-08).

areal/engine/megatron_engine.py (MegatronEngine), areal/models/mcore/registry.py. There is no command line of Megatron:
V is actor.megatron.virtual_pipeline_parallel_size. The chunks are in a subclass of list. Results leave the loss
function by side effects; it reports nothing, and the loss carries the optimizer's scale and the number of
micro-batches. Actor and reference are two engines of one process over the same groups.

variants: "" as its defaults; "overlap" with ddp.overlap_grad_reduce, for which AReaL sets no_sync_func alone; "save"
writes the weights at the end, and "load" starts from them.
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

DTYPE = torch.float32
Row = dict[str, Any]


class ModelList(list):  # type: ignore[type-arg]
    """The chunks of a rank, with some of a module's methods."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self:
            yield from chunk.parameters()


def main(job: Job) -> None:
    """Run the job in this rank."""
    import megatron_bfpp

    megatron_bfpp.enable(job.schedule, device="cpu")  # before the trainer imports Megatron
    actor = Engine(job)
    reference = Engine(job)
    if job.variant == "load":
        load(job.folder / "saved", actor.model)
        load(job.folder / "saved", reference.model)
        actor.optimizer.reload_model_params()
    with torch.no_grad():
        for each in reference.model.parameters():
            each.mul_(0.9)
    record = Record(job)
    for rollout, counts in enumerate(job.rollouts):
        time.sleep(job.pause_s)  # the inference engine generates
        for step, count in enumerate(counts):
            rows = [{"tokens": microbatch(rollout, step, dp_rank(), each)} for each in range(count)]
            for name, engine in (("ref", reference), ("old", actor)):
                found = engine.forward_batch(rows)
                record.add(f"{name}_log_probs", found)  # broadcast: on every rank of the pipeline
                for row, each in zip(rows, found):
                    row[name] = each.split([len(tokens) - 1 for tokens in row["tokens"]])
            norm = actor.train_batch(rows)
            record.add("losses", actor.losses)
            record.add("grad norm", norm)
            record.add("evaluation", actor.eval_batch(rows))
    record.write(actor.model)
    if job.variant == "save":
        save(job.folder / "saved", actor.model)


def dp_rank() -> int:
    from megatron.core import mpu

    return int(mpu.get_data_parallel_rank())


class Engine:
    """MegatronEngine: one model of the process."""

    def __init__(self, job: Job):
        from megatron.core import mpu
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.utils import get_model_config

        if not dist.is_initialized():
            dist.init_process_group("nccl")  # as there; the CPU mode starts gloo
            mpu.initialize_model_parallel(
                pipeline_model_parallel_size=job.pp,
                virtual_pipeline_model_parallel_size=job.chunks if job.chunks > 1 else None, use_sharp=False,
                order="tp-cp-ep-dp-pp", context_parallel_size=1, distributed_timeout_minutes=120,
            )  # fmt: skip
            model_parallel_cuda_manual_seed(0)
        torch.manual_seed(1)
        overlaps = job.variant == "overlap"
        config = transformer_config(job.pp, job.chunks, DTYPE)
        self.model = ModelList(
            wrapped(
                config, chunks_of(config, job.chunks), use_distributed_optimizer=True, grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlaps, bucket_size=1000 if overlaps else None,
            )
        )  # fmt: skip
        for chunk in self.model:
            chunk.vp_stage = chunk.module.vp_stage
        model_config = get_model_config(self.model[0])
        if overlaps:
            model_config.no_sync_func = [chunk.no_sync for chunk in self.model]
        model_config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = optimizer_of(list(self.model), DTYPE, is_distributed=True)
        self.losses: list[torch.Tensor] = []

    def forward_backward_batch(self, rows: list[Row], process: Callable[..., Any], forward_only: bool = False) -> None:
        """Run the schedule; `process` is called with logits and row of each micro-batch, on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: Iterator[Row], model: Any) -> Any:
            row = next(iterator)
            tokens, parameters = packed(row["tokens"])
            output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=parameters)

            def finish(row: Row, output: torch.Tensor) -> Any:
                loss = process(output, row)
                return torch.tensor(1.0) if loss is None else loss, {}

            return output, partial(finish, row)

        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(rows) for _ in self.model], model=self.model,
            num_microbatches=len(rows), seq_length=max(sum(map(len, row["tokens"])) for row in rows),
            micro_batch_size=1, forward_only=forward_only,
        )  # fmt: skip

    def train_batch(self, rows: list[Row]) -> Any:
        """Return the gradient's norm."""
        from megatron.core import mpu

        self.optimizer.zero_grad()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        weight = self._total_weight(rows)
        multiplier = mpu.get_data_parallel_world_size() * self.optimizer.get_loss_scale().item() * len(rows)
        self.losses = []
        self.forward_backward_batch(rows, partial(self._loss, weight=weight, multiplier=multiplier))
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return norm

    @torch.no_grad()
    def eval_batch(self, rows: list[Row]) -> list[torch.Tensor]:
        """Return the losses of the micro-batches on the last stage."""
        self.losses = []
        weight = self._total_weight(rows)
        self.forward_backward_batch(rows, partial(self._loss, weight=weight, multiplier=1.0), forward_only=True)
        return self.losses

    @torch.no_grad()
    def forward_batch(self, rows: list[Row]) -> list[torch.Tensor]:
        """Return the log-probabilities of each micro-batch, on every rank of the pipeline."""
        from megatron.core import mpu

        outputs: list[torch.Tensor] = []

        def keep(logits: torch.Tensor, row: Row) -> None:
            outputs.append(torch.cat(log_probabilities(logits, row["tokens"])))

        self.forward_backward_batch(rows, keep, forward_only=True)
        if not mpu.is_pipeline_last_stage():
            outputs = [torch.empty(sum(len(each) - 1 for each in row["tokens"])) for row in rows]
        for each in outputs:
            dist.broadcast(
                each, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
            )
        return outputs

    def _loss(self, logits: torch.Tensor, row: Row, weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        mine = sum(map(len, row["tokens"]))
        loss = policy_loss(log_probabilities(logits, row["tokens"]), row["old"], row["ref"], advantage=0.5)
        self.losses.append(loss.detach())
        return loss * (mine / weight * multiplier)

    def _total_weight(self, rows: list[Row]) -> torch.Tensor:
        from megatron.core import mpu

        total = torch.tensor(float(sum(len(each) for row in rows for each in row["tokens"])))
        dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return total

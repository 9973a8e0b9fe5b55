"""slime's calls in slime's order. Read at THUDM/slime 624b824a (2026-08).

train.py parses Megatron's command line with slime/utils/arguments.py and hands the Namespace to Ray actors, which set
it and build everything from it: slime/backends/megatron_utils/{arguments,initialize,model,actor,data}.py. Megatron's
own training loop never runs, so `curr_iteration` is never set. One model serves as actor and reference: weights are
copied in and out (TensorBackuper). With --offload-train the process groups, the world's included, are destroyed between
steps and made anew behind the same objects (slime/utils/reloadable_process_group.py).

variants: "" enables in the actor, after the command line was parsed without the plugin; "flags" enables before, with
the plugin's flags on it; "offload" is the first with the groups destroyed and made anew around each rollout.
"""

import sys
import time
from argparse import Namespace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from . import reloadable
from .tiny import (
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    LONGEST,
    VOCABULARY,
    Job,
    Record,
    gpt,
    log_probabilities,
    microbatch,
    packed,
    policy_loss,
    rank_and_size,
)

SAMPLES = 8  # of a training step, over all replicas


class DataIterator:
    """The micro-batches of a rollout by an explicit schedule; each model chunk has one of its own."""

    def __init__(self, data: dict[str, list[Any]], indices: list[list[int]]):
        self.data, self.indices, self.offset = data, indices, 0

    def get_next(self, keys: list[str]) -> dict[str, list[Any]]:
        chosen = self.indices[self.offset]
        self.offset += 1
        return {key: [self.data[key][each] for each in chosen] for key in keys if key in self.data}

    def reset(self) -> None:
        self.offset = 0


def main(job: Job) -> None:
    """Run the job in this rank."""
    import megatron_bfpp

    if job.variant == "flags":
        megatron_bfpp.enable(device="cpu")
        args = parse(job, ["--pipeline-schedule", job.schedule])
    else:
        import megatron.training.training  # noqa: F401 - the trainer's imports come before

        megatron_bfpp.enable("1f1b", device="cpu")  # for the CPU: with GPUs the process of train.py has no plugin
        args = parse(job, [])
        for name in [each for each in vars(args) if each.startswith(("pipeline_schedule", "breadth_first", "bfpp"))]:
            delattr(args, name)
        megatron_bfpp.disable()
        megatron_bfpp.enable(job.schedule, device="cpu")
    Actor(job, args).run()


def parse(job: Job, more: list[str]) -> Namespace:
    """Parse Megatron's command line as in the process of train.py."""
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = [
        "train.py", "--pipeline-model-parallel-size", str(job.pp), "--num-layers", str(LAYERS), "--hidden-size",
        str(HIDDEN), "--num-attention-heads", str(HEADS), "--seq-length", str(LONGEST), "--max-position-embeddings",
        str(LONGEST), "--position-embedding-type", "rope", "--vocab-size", str(VOCABULARY), "--tokenizer-type",
        "NullTokenizer", "--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0",
        "--micro-batch-size", "1", "--global-batch-size", str(SAMPLES), "--lr", str(LEARNING_RATE),
        "--transformer-impl", "local", "--num-virtual-stages-per-pipeline-rank", str(job.chunks),
        "--no-gradient-accumulation-fusion", "--num-rollout", str(len(job.rollouts)), "--sglang-unknown-flag", "1",
        *more, *job.flags,
    ]  # fmt: skip

    def own(parser: Any) -> Any:
        parser.add_argument("--num-rollout", type=int)
        return parser

    args = parse_args(extra_args_provider=own, ignore_unknown_args=True)
    args.rank, args.world_size = 0, rank_and_size()[1]
    args.use_distributed_optimizer, args.bf16, args.train_iters = True, True, None
    args.padded_vocab_size = VOCABULARY
    args.enable_gloo_process_groups = getattr(args, "enable_gloo_process_groups", True)
    validate_args(args)
    args.variable_seq_lengths, args.moe_token_dispatcher_type = True, "alltoall"
    return args


class Actor:
    """MegatronTrainRayActor: what each rank holds, and one rollout after the other."""

    def __init__(self, job: Job, args: Namespace):
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.training.global_vars import _build_tokenizer, set_args

        self.job, self.args, self.record = job, args, Record(job)
        if job.variant == "offload":
            reloadable.install()
        dist.init_process_group("nccl")  # as there; the CPU mode starts gloo
        args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
        set_args(args)
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            pipeline_model_parallel_comm_backend=args.pipeline_model_parallel_comm_backend,
            context_parallel_size=args.context_parallel_size,
            distributed_timeout_minutes=args.distributed_timeout_minutes, order="tp-cp-ep-dp-pp",
            create_gloo_process_groups=args.enable_gloo_process_groups,
        )  # fmt: skip
        torch.manual_seed(args.seed + 100 * mpu.get_pipeline_model_parallel_rank())
        model_parallel_cuda_manual_seed(args.seed + 100 * mpu.get_pipeline_model_parallel_rank())
        _build_tokenizer(args)
        init_num_microbatches_calculator(
            args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size, False
        )
        self._build()
        self.backups: dict[str, list[torch.Tensor]] = {}
        self._backup("actor")
        with torch.no_grad():  # load_other_checkpoint: the reference's weights are read into the same model
            for each in self._weights():
                each.mul_(0.9)
        self._backup("ref")
        self._switch("actor")

    def _build(self) -> None:
        import dataclasses

        from megatron.core.enums import ModelType
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.training.arguments import core_transformer_config_from_args
        from megatron.training.training import get_model

        args = self.args

        def provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any) -> Any:
            return gpt(core_transformer_config_from_args(args), pre_process, post_process, vp_stage)

        self.model = get_model(provider, ModelType.encoder_or_decoder)
        fields = {each.name for each in dataclasses.fields(OptimizerConfig)}
        config = OptimizerConfig(**{name: value for name, value in vars(args).items() if name in fields})
        config.timers = None
        self.optimizer = get_megatron_optimizer(
            config=config, model_chunks=self.model, use_gloo_process_groups=args.enable_gloo_process_groups
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=args.lr_warmup_init, max_lr=args.lr, min_lr=args.min_lr, lr_warmup_steps=0,
            lr_decay_steps=100 * SAMPLES, lr_decay_style="constant", start_wd=args.weight_decay,
            end_wd=args.weight_decay, wd_incr_steps=100 * SAMPLES, wd_incr_style="constant",
        )  # fmt: skip

    def _weights(self) -> list[torch.Tensor]:
        return [each for chunk in self.model for each in (*chunk.parameters(), *chunk.module.buffers())]

    def _backup(self, tag: str) -> None:
        self.backups[tag] = [each.detach().clone() for each in self._weights()]

    @torch.no_grad()
    def _switch(self, tag: str) -> None:
        for mine, kept in zip(self._weights(), self.backups[tag]):
            mine.copy_(kept)

    def run(self) -> None:
        """Run the rollouts: wake up, reference and policy forward, train, sleep."""
        if self.job.variant == "offload":
            reloadable.destroy()
        for number, counts in enumerate(self.job.rollouts):
            time.sleep(self.job.pause_s)  # sglang generates
            if self.job.variant == "offload":
                reloadable.reload()
            self._train_actor(number, counts)
            if self.job.variant == "offload":
                reloadable.destroy()
        if self.job.variant == "offload":
            reloadable.reload()
        self.record.write(self.model)

    def _train_actor(self, rollout: int, counts: tuple[int, ...]) -> None:
        from megatron.core import mpu

        replica = mpu.get_data_parallel_rank()
        groups = [microbatch(rollout, replica, each) for each in range(sum(counts))]
        data: dict[str, list[Any]] = {"tokens": [each for group in groups for each in group]}
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group))
        indices = [list(range(first, last)) for first, last in pairwise(starts)]
        iterators = [DataIterator(data, indices) for _ in range(mpu.get_virtual_pipeline_model_parallel_world_size())]

        self._switch("ref")
        data.update(self._forward_only(iterators, counts, "ref_"))
        self._switch("actor")
        data.update(self._forward_only(iterators, counts, ""))
        for name in ("ref_log_probs", "log_probs"):
            if name in data:
                self.record.add(name, data[name])
        self._train(iterators, counts)
        self._backup("actor")

    @torch.no_grad()
    def _forward_only(
        self, iterators: list[DataIterator], counts: tuple[int, ...], prefix: str
    ) -> dict[str, list[Any]]:
        from megatron.core import mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: DataIterator, model: Any, return_schedule_plan: bool = False) -> Any:
            batch = iterator.get_next(["tokens"])
            tokens, parameters = packed(batch["tokens"])
            output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=parameters)
            return output, partial(collect, batch)

        def collect(batch: dict[str, list[Any]], logits: torch.Tensor, non_loss_data: bool = False) -> Any:
            return logits.new_zeros(()), {"log_probs": log_probabilities(logits, batch["tokens"])}

        for iterator in iterators:
            iterator.reset()
        for chunk in self.model:
            chunk.eval()
        run, found = get_forward_backward_func(), []
        for count in counts:
            found += run(
                forward_step_func=forward_step, data_iterator=iterators, model=self.model, num_microbatches=count,
                seq_length=self.args.seq_length, micro_batch_size=self.args.micro_batch_size, forward_only=True,
            )  # fmt: skip
        for chunk in self.model:
            chunk.train()
        if not mpu.is_pipeline_last_stage():
            return {}
        return {f"{prefix}log_probs": [each for batch in found for each in batch["log_probs"]]}

    def _train(self, iterators: list[DataIterator], counts: tuple[int, ...]) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.utils import get_model_config

        for iterator in iterators:
            iterator.reset()
        config = get_model_config(self.model[0])
        config.grad_scale_func, config.timers = self.optimizer.scale_loss, None
        config.finalize_model_grads_func = finalize_model_grads
        for count in counts:
            self._train_one_step(iterators, count)

    def _train_one_step(self, iterators: list[DataIterator], count: int) -> None:
        from megatron.core import mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)

        def forward_step(iterator: DataIterator, model: Any, return_schedule_plan: bool = False) -> Any:
            batch = iterator.get_next(["tokens", "log_probs", "ref_log_probs"])
            tokens, parameters = packed(batch["tokens"])
            output = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=parameters)
            return output, partial(loss_function, batch)

        def loss_function(batch: dict[str, list[Any]], logits: torch.Tensor) -> Any:
            now = log_probabilities(logits, batch["tokens"])
            loss = policy_loss(now, batch["log_probs"], batch["ref_log_probs"], advantage=0.5)
            report = {"keys": ["loss"], "values": torch.stack([loss.new_zeros(()), loss.detach()])}
            return loss * count / SAMPLES * replicas, torch.tensor(1), report

        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iterators, model=self.model, num_microbatches=count,
            seq_length=self.args.seq_length, micro_batch_size=self.args.micro_batch_size,
            decoder_seq_length=self.args.decoder_seq_length, forward_only=False,
        )  # fmt: skip
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        self.scheduler.step(increment=SAMPLES)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.record.add("losses", [each["values"] for each in reports])
        self.record.add("grad norm", norm)

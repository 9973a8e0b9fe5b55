"""The parts of a GPT script that Megatron's trainer asks for: data sets, forward step, loss, embedding ranks.

The values are those of Megatron's own pretrain_gpt.py, bit for bit, on megatron-core 0.17, 0.18 and 0.19. Where a
helper of Megatron moved between these releases, the one that is there is used.
"""

import inspect
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import megatron.core.utils as core_utils
import megatron.training.utils as training_utils
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

__all__ = ["datasets", "embedding_ranks", "forward_step", "loss_func", "micro_batch"]

FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# Packed sequences only, which this entry point refuses; the helpers of 0.18 and 0.19 look for the keys.
PACKED_FIELDS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
# Arguments that Megatron's functions take under the names of its flags.
_BROADCAST_NAMES = (
    *("create_attention_mask_in_dataloader", "micro_batch_size", "seq_length"),
    "pipeline_model_parallel_size",
)
_DATASET_NAMES = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads", "mmap_bin_files"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "object_storage_cache_path"),
    *("mid_level_dataset_surplus", "allow_ambiguous_pad_tokens", "context_parallel_size", "data_parallel_size"),
)
# --check-for-spiky-loss: a loss above this multiple of the largest so far, as in Megatron's script.
SPIKY_LOSS_FACTOR = 10.0


def forward_step(data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """Run one micro-batch through one model chunk; return its output and the function that makes a loss of it."""
    timers, stragglers = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        batch = micro_batch(data_iterator, get_model_config(model), get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with stragglers:
        # --overlap-moe-expert-parallel-comm asks for a plan of the forward, and runs that.
        output = (model.build_schedule_plan if return_schedule_plan else model)(*inputs, **targets)
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the unmasked losses of one micro-batch, their number, and both for the log.

    Args:
        loss_mask: [microbatch, seq / cp], 1 where the loss counts
        output: [microbatch, seq / cp], the loss of every token
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    _check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def _check_loss(loss: torch.Tensor) -> None:
    # A GPT's forward is deterministic (tolerance 0), so a rerun that differs is a fault of the hardware.
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejection, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            rerun.validate_result(result=loss, rejection_func=rejection, message=message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        rejection = partial(rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        rerun.validate_result(result=loss, rejection_func=rejection, message="Spiky loss", tolerance=0.0, fatal=False)


def micro_batch(data_iterator: Iterator[Any], config: Any, vp_stage: int | None) -> dict[str, Any]:
    """Return the next micro-batch: FIELDS, None where this model chunk has no use for one."""
    with_mtp = _holds_mtp(config, vp_stage)
    if not (is_first_or_last_pipeline_stage(vp_stage) or with_mtp):
        return dict.fromkeys(FIELDS)
    if hasattr(core_utils, "get_batch_on_this_tp_rank"):
        batch = _micro_batch_018(data_iterator, with_mtp)
    else:  # 0.17: these helpers read the arguments and the process groups themselves
        batch = training_utils.get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank=with_mtp)
        # They would be cut along the sequence too, and the broadcast leaves a lone cu_seqlens of no entries.
        batch = core_utils.get_batch_on_this_cp_rank({field: batch[field] for field in FIELDS})
    return {field: batch[field] for field in FIELDS}


def _micro_batch_018(data_iterator: Iterator[Any], with_mtp: bool) -> dict[str, Any]:
    """Call the helpers of 0.18 and 0.19, which take everything as arguments."""
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for field in FIELDS + PACKED_FIELDS:
            value = sample.get(field)
            batch[field] = None if value is None else value.cuda(non_blocking=True)
    broadcast = core_utils.get_batch_on_this_tp_rank
    packed = "is_sft" if "is_sft" in inspect.signature(broadcast).parameters else "has_cu_seqlens"  # renamed in 0.19
    batch = broadcast(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        is_hybrid_cp=False,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        mtp_on_this_rank=with_mtp,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        **{name: getattr(args, name) for name in _BROADCAST_NAMES},
        **{packed: False},
    )
    group = mpu.get_context_parallel_group()
    found: dict[str, Any] = core_utils.get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return found


def _holds_mtp(config: Any, vp_stage: int | None) -> bool:
    """Return whether this model chunk has multi-token prediction layers."""
    if "config" in inspect.signature(mtp_on_this_rank).parameters:  # 0.17
        return bool(mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage))
    layout, layers = config.pipeline_model_parallel_layout, config.mtp_num_layers
    return bool(mtp_on_this_rank(layout=layout, mtp_num_layers=layers, ignore_virtual=False, vp_stage=vp_stage))


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Return training, validation and test set of one model chunk; None for each where the chunk reads no data."""
    args = get_args()
    config = core_transformer_config_from_args(args)

    def is_built_here() -> bool:
        reads_data = is_first_or_last_pipeline_stage(vp_stage) or _holds_mtp(config, vp_stage)
        return mpu.get_tensor_model_parallel_rank() == 0 and reads_data

    print_rank_0("> building train, validation, and test datasets for GPT ...")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    built: tuple[Any, Any, Any]
    built = BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, _dataset_config(args)).build()
    print_rank_0("> finished creating GPT datasets ...")
    return built


# Every rank builds its own part, and Megatron must not broadcast it. An attribute is how it asks.
datasets.is_distributed = True  # type: ignore[attr-defined]


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences_per_dataset = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences_per_dataset,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        hybrid_context_parallel=False,
        **{name: getattr(args, name) for name in _DATASET_NAMES},
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the pipeline ranks with word embeddings: the first, the last if tied, those of multi-token prediction."""
    if len(pp_ranks) == 1:
        return list(pp_ranks)
    args = get_args()
    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args))}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)

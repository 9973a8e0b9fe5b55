"""How parsed flags run on a number of GPUs."""

import argparse
from dataclasses import replace
from typing import Any

from ...console.errors import UserError
from ...schedule.ir import PipelineShape
from ...schedule.model.chunks import check_chunks
from ...schedule.names import word_of
from ...schedule.plan import lags_for
from ..activations.rank import CORE
from ..model import GPT, Experts
from ..strategy import SCHEDULES, Strategy, count_microbatches
from .model import gpt_of
from .placing import Placing, placing_of

__all__ = ["rounded_batch", "strategy_of"]

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out")


def rounded_batch(args: argparse.Namespace, num_gpus: int) -> int:
    """Return the flags' global batch, or the next one that their micro-batches fill on so many GPUs.

    Without a batch it is one micro-batch of each replica, as Megatron derives it. Megatron's interleaved schedule needs
    a group of micro-batches on each. A line of the notes says so.
    """
    pp, given = args.pipeline_model_parallel_size, args.global_batch_size
    replicas = max(1, num_gpus // (pp * args.tensor_model_parallel_size * args.context_parallel_size))
    unit, least = replicas * args.micro_batch_size, 1
    if pp > 1 and args.pipeline_schedule == "1f1b" and placing_of(args, pp, 0).chunks > 1:
        least = max(pp, args.microbatch_group_size_per_virtual_pipeline_stage or pp)
    batch: int = max(least, -(-(given or unit) // unit)) * unit
    if batch != given:
        wrong = "is not given" if given is None else f"{given} is too small for this, or does not divide"
        args.notes.append(f"--global-batch-size {wrong}: {batch}, {batch // unit} micro-batches of"
                          f" {args.micro_batch_size} on each of {replicas} replicas")  # fmt: skip
    return batch


def strategy_of(args: argparse.Namespace, num_gpus: int, placing: Placing | None = None) -> Strategy:
    """Return how the flags run on so many GPUs. Raises UserError where they do not say it, or do not divide.

    placing: where the layers are known to go, in place of what the flags say of it.
    """
    pp, tp, cp = (getattr(args, f"{name}_parallel_size") for name in ("pipeline_model", "tensor_model", "context"))
    micro_batch, batch = args.micro_batch_size, args.global_batch_size
    if batch is None:
        raise UserError("--global-batch-size is not among the flags.\n  Add it: a step has so many sequences.")
    dp, rest = divmod(num_gpus, pp * tp * cp)
    count = count_microbatches(batch, dp, micro_batch) if dp and not rest else None
    if count is None:
        ranks = " x ".join([f"TP {tp}", *([f"CP {cp}"] if cp > 1 else []), f"PP {pp}"])
        if rest or not dp:
            raise UserError(f"{num_gpus} GPUs are no multiple of {ranks} = {pp * tp * cp}.\n"
                            "  Use a multiple as --gpus, or other parallel sizes in the flags.")  # fmt: skip
        unit = micro_batch * dp
        near = [str(times * unit) for times in (batch // unit, batch // unit + 1) if times]
        raise UserError(f"--global-batch-size {batch} is no multiple of {unit}: --micro-batch-size {micro_batch} on"
                        f" each of {dp} replicas ({num_gpus} GPUs / {ranks}).\n"
                        f"  Use {' or '.join(near)}.")  # fmt: skip
    gpt, placing = gpt_of(args), placing or placing_of(args, pp, count)
    chunks = placing.chunks
    schedule, group = _schedule_of(args, gpt, pp, chunks, count)
    recompute = args.recompute_granularity or ("selective" if args.recompute_activations else "none")
    found = Strategy(
        schedule, pp, tp, dp, chunks, micro_batch, count, group, _sharding_of(args), recompute,
        args.sequence_parallel, args.breadth_first_hop, stage_layers=placing.layers, mtp_stage=placing.mtp_stage,
        placing=placing.words, **fixed_of(args),
    )  # fmt: skip
    _check(gpt, found)
    if not found.is_split:
        return found
    return replace(found, weight_lag=args.breadth_first_weight_lag, times=gpt.times(recompute))


def fixed_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a search leaves as the flags have it, by the names of a Strategy's fields."""
    return {
        "cp": args.context_parallel_size, "ep": args.expert_model_parallel_size,
        "etp": args.expert_tensor_parallel_size or 0, "modules": _modules_of(args), "cp_exchange": _exchange_of(args),
        "overlaps_experts": args.overlap_moe_expert_parallel_comm, "overlaps_shared": args.moe_shared_expert_overlap,
        "overlaps_tensor": args.tp_comm_overlap, "dispatcher": args.moe_token_dispatcher_type, **_bytes_of(args),
    }  # fmt: skip


def _bytes_of(args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of a parameter's gradient and optimizer state where the flags change them."""
    found = {"gradient_bytes": 2} if args.grad_reduce_in_bf16 and args.bf16 else {}
    if args.use_precision_aware_optimizer:
        if args.main_grads_dtype != "fp32":
            found["gradient_bytes"] = _BYTES[args.main_grads_dtype]
        state = [_BYTES[getattr(args, name)] for name in ("exp_avg_dtype", "exp_avg_sq_dtype")]
        # The 16 bits of the parameter are half of its main copy where that is in fp32, which then keeps the rest.
        found["optimizer_bytes"] = sum(state) + (
            2 if args.main_params_dtype == "fp32" else _BYTES[args.main_params_dtype]
        )
    return found


def _sharding_of(args: argparse.Namespace) -> str:
    if args.use_megatron_fsdp:
        kind = args.data_parallel_sharding_strategy
        if kind == "optim_grads":
            raise UserError("--data-parallel-sharding-strategy optim_grads is not in the model of bfpp plan.\n"
                            "  It knows no_shard, optim and optim_grads_params.")  # fmt: skip
        return {"no_shard": "replicated", "optim": "zero1", "optim_grads_params": "megatron-fsdp"}[kind]
    return "zero3" if args.use_torch_fsdp2 else "zero1" if args.use_distributed_optimizer else "replicated"


def _modules_of(args: argparse.Namespace) -> tuple[str, ...]:
    for module in args.recompute_modules:
        if module not in _MODULES:
            raise UserError(f"--recompute-modules {module} does not exist.\n  Use some of {', '.join(_MODULES)}.")
    return tuple(args.recompute_modules) or CORE


def _exchange_of(args: argparse.Namespace) -> str:
    kinds: set[str] = set(args.cp_comm_type) or {"p2p"}
    for kind in kinds:
        if kind not in ("p2p", "a2a", "all_gather", "a2a+p2p"):
            raise UserError(f"--cp-comm-type {kind} does not exist.\n  Use p2p, a2a, all_gather or a2a+p2p.")
    if kinds == {"a2a+p2p"} or len(kinds) > 1:
        args.notes.append(f"--cp-comm-type {' '.join(args.cp_comm_type)} is counted as a2a")
        return "a2a"
    return kinds.pop()


def _check(gpt: GPT, s: Strategy) -> None:
    """Raise UserError where heads, positions or experts do not divide over their ranks."""
    heads, groups, split = gpt.num_attention_heads, gpt.groups, s.split
    if heads % s.tp:
        raise UserError(f"--num-attention-heads {heads} is no multiple of --tensor-model-parallel-size {s.tp}.")
    if s.cp > 1 and gpt.seq_length % (2 * s.cp):
        raise UserError(f"--seq-length {gpt.seq_length} is no multiple of {2 * s.cp}, twice --context-parallel-size"
                        f" {s.cp}.\n  Each rank takes two parts of a sequence.")  # fmt: skip
    keys = heads if gpt.latent is not None else groups
    if s.cp_exchange == "a2a" and (heads // s.tp % s.cp or max(1, keys // s.tp) % s.cp):
        raise UserError(f"--cp-comm-type a2a divides heads over --context-parallel-size {s.cp}, but a rank of TP {s.tp}"
                        f" has {heads // s.tp} of queries and {max(1, keys // s.tp)} of keys.\n"
                        "  Use --cp-comm-type p2p.")  # fmt: skip
    experts = gpt.experts
    if experts is None:
        if s.ep > 1:
            raise UserError(
                f"--expert-model-parallel-size {s.ep} needs experts.\n  Add --num-experts, or leave it out."
            )
        return
    _check_experts(experts, s)
    if s.tp * s.cp * s.dp % (split.ep * split.etp):
        raise UserError(f"the {s.tp * s.cp * s.dp} ranks of TP {s.tp} x CP {s.cp} x DP {s.dp} are no multiple of"
                        f" --expert-model-parallel-size {split.ep} x --expert-tensor-parallel-size {split.etp}.\n"
                        "  Change one of them, or the number of GPUs.")  # fmt: skip


def _check_experts(experts: Experts, s: Strategy) -> None:
    if experts.count % s.ep:
        raise UserError(f"--num-experts {experts.count} is no multiple of --expert-model-parallel-size {s.ep}.\n"
                        "  Change one of them.")  # fmt: skip
    if experts.ffn % s.split.etp:
        raise UserError(f"--moe-ffn-hidden-size {experts.ffn} is no multiple of --expert-tensor-parallel-size"
                        f" {s.split.etp}.\n  Change one of them.")  # fmt: skip


def _schedule_of(args: argparse.Namespace, gpt: GPT, pp: int, chunks: int, count: int) -> tuple[str, int]:
    """Return the schedule by its word, and its group."""
    if pp == 1:
        return "no-pipeline", count
    if args.pipeline_schedule == "breadth-first":
        check_chunks(chunks, pp)
        group = min(count, args.breadth_first_group_size or count)
    else:
        group = count if chunks == 1 else args.microbatch_group_size_per_virtual_pipeline_stage or pp
    gradients = args.breadth_first_weight_gradients
    if gradients == "auto":
        times = gpt.times(args.recompute_granularity or "none")
        order = PipelineShape(pp, chunks, count), group, args.breadth_first_backward == "eager"
        lags, _ = lags_for("auto", *order, args.breadth_first_weight_lag, args.breadth_first_hop, times)
        gradients = "with-backward" if lags is None else "deferred"
    backward = args.breadth_first_backward
    word = word_of(args.pipeline_schedule, pp, chunks, count, group, backward=backward, weight_gradients=gradients)
    if word not in SCHEDULES:
        raise UserError(f"bfpp plan does not know {word}: both --breadth-first-backward late and deferred weights'"
                        " gradients.\n  Leave out one of them.")  # fmt: skip
    return word, group

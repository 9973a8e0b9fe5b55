"""Reads a model, and how it is to be run, from Megatron's flags. Flags about neither are passed over."""

import argparse
from dataclasses import replace
from typing import NoReturn

from ..console.errors import UserError
from ..console.numbers import at_least
from ..schedule.ir import PipelineShape
from ..schedule.lower import DEFAULT_HOP
from ..schedule.names import word_of
from ..schedule.plan import lags_for
from .model import GPT
from .strategy import SCHEDULES, Strategy, count_microbatches

__all__ = ["gpt_of", "parse", "precision_of", "strategy_of"]

_REQUIRED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--vocab-size")
_SIZES = (
    "--ffn-hidden-size", "--num-query-groups", "--kv-channels", "--max-position-embeddings",
    "--make-vocab-size-divisible-by",
)  # fmt: skip
_PARALLEL = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage", "--micro-batch-size", "--global-batch-size",
    "--microbatch-group-size-per-virtual-pipeline-stage", "--breadth-first-group-size", "--recompute-num-layers",
)  # fmt: skip
_SWITCHES = (
    "--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear", "--add-qkv-bias", "--qk-layernorm",
    "--group-query-attention", "--sequence-parallel", "--use-distributed-optimizer", "--use-torch-fsdp2", "--bf16",
    "--fp16", "--recompute-activations", "--fp8-param-gather",
)  # fmt: skip
_WORDS: dict[str, tuple[tuple[str, ...], str | None]] = {  # flag: its choices, and its default
    "--normalization": (("LayerNorm", "RMSNorm"), "LayerNorm"),
    "--position-embedding-type": (("learned_absolute", "rope", "none"), "learned_absolute"),
    "--recompute-granularity": (("selective", "full"), None),
    "--recompute-method": (("uniform", "block"), None),
    "--fp8-format": (("e4m3", "hybrid"), None),
    "--pipeline-schedule": (("1f1b", "breadth-first"), "1f1b"),
    "--breadth-first-backward": (("eager", "late"), "eager"),
    "--breadth-first-weight-gradients": (("with-backward", "deferred", "auto"), "with-backward"),
}
# Flags that change what the estimate would have to count.
_UNKNOWN = (
    "--num-experts", "--multi-latent-attention", "--mtp-num-layers", "--hybrid-layer-pattern",
    "--hybrid-override-pattern", "--context-parallel-size", "--expert-model-parallel-size",
    "--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split", "--use-megatron-fsdp",
    "--recompute-modules", "--fp4-format", "--first-last-layers-bf16", "--fp8-dot-product-attention",
    "--fp8-multi-head-attention", "--fp8-output-proj", "--activation-func-fp8-input-store",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"the model's flags: {message}.")


def parse(words: list[str]) -> argparse.Namespace:
    """Parse the flags that matter here. Raises UserError for a wrong value, or for a model that is not a dense GPT."""
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    for flag in (*_REQUIRED, *_SIZES, *_PARALLEL):
        parser.add_argument(flag, type=at_least(1))
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag, (choices, default) in _WORDS.items():
        parser.add_argument(flag, choices=choices, default=default)
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--fp8-recipe", default="delayed")
    parser.add_argument("--breadth-first-hop", type=float, default=DEFAULT_HOP)
    parser.add_argument("--breadth-first-weight-lag", type=at_least(0))
    args, rest = parser.parse_known_args(words)
    for flag, following in zip(rest, [*rest[1:], ""], strict=False):
        name, is_joined, value = flag.partition("=")
        value = value if is_joined else following
        if name in _UNKNOWN and not (name.endswith("-size") and value == "1"):
            raise UserError(f"{name} is not in the model of bfpp plan, which is a dense GPT with tensor, pipeline and"
                            " data parallelism.\n  Leave it out to plan without it.")  # fmt: skip
    if args.recompute_method == "block" or (args.recompute_num_layers or 1) != 1:
        raise UserError("bfpp plan knows full recomputation of every single layer only.\n"
                        "  Use --recompute-method uniform --recompute-num-layers 1.")  # fmt: skip
    _check_fp8(args)
    return args


def _check_fp8(args: argparse.Namespace) -> None:
    """Refuse uses of fp8 that the estimate does not cover, and those that Megatron refuses."""
    if args.fp8_format is None:
        if args.fp8_param_gather:
            raise UserError("--fp8-param-gather is for fp8.\n  Add --fp8-format hybrid, or leave it out.")
        return
    if args.fp8_recipe not in ("delayed", "tensorwise"):
        raise UserError(f"--fp8-recipe {args.fp8_recipe} is not in the model of bfpp plan: one scale per tensor.\n"
                        "  Use --fp8-recipe delayed or tensorwise, or leave out --fp8-format.")  # fmt: skip
    if args.fp16 or args.use_torch_fsdp2:
        wrong = "--fp16" if args.fp16 else "--use-torch-fsdp2"
        raise UserError(f"fp8 with {wrong} is not in the model of bfpp plan.\n  Leave out {wrong}, or --fp8-format.")
    if args.fp8_param_gather and not args.use_distributed_optimizer:
        raise UserError("--fp8-param-gather needs the distributed optimizer.\n  Add --use-distributed-optimizer.")


def gpt_of(args: argparse.Namespace) -> GPT:
    """Return the model of parsed flags. Raises UserError for a missing size, or sizes that do not fit together."""
    sizes = {flag: getattr(args, _name(flag)) for flag in (*_REQUIRED, *_SIZES)}
    missing = [flag for flag in _REQUIRED if sizes[flag] is None]
    if missing:
        raise UserError(f"the model lacks {', '.join(missing)}.\n"
                        "  Give a file of configs/, or Megatron's flags after --.")  # fmt: skip
    same = {_name(flag): size for flag, size in sizes.items() if size is not None}
    groups = same.pop("num_query_groups", 1)
    return GPT(
        **same,
        num_query_groups=groups if args.group_query_attention else 0,
        swiglu=args.swiglu,
        untied=args.untie_embeddings_and_output_weights,
        rms_norm=args.normalization == "RMSNorm",
        linear_bias=not args.disable_bias_linear,
        qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        learned_positions=args.position_embedding_type == "learned_absolute",
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
    )


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def precision_of(args: argparse.Namespace) -> str | None:
    """Return the precision that the flags name, if any. fp8 is that of the layers' products, fp8-params of their
    parameters too.
    """
    if args.fp8_format is not None:
        return "fp8-params" if args.fp8_param_gather else "fp8"
    return "bf16" if args.bf16 else "fp16" if args.fp16 else None


def strategy_of(args: argparse.Namespace, num_gpus: int) -> Strategy:
    """Return how the flags run on so many GPUs. Raises UserError where they do not say it, or do not divide."""
    pp, tp = args.pipeline_model_parallel_size or 1, args.tensor_model_parallel_size or 1
    micro_batch, batch = args.micro_batch_size or 1, args.global_batch_size
    if batch is None:
        raise UserError("--global-batch-size is not among the flags.\n  Add it: a step has so many sequences.")
    dp, rest = divmod(num_gpus, pp * tp)
    count = count_microbatches(batch, dp, micro_batch) if dp and not rest else None
    if count is None:
        raise UserError(f"{num_gpus} GPUs, TP {tp}, PP {pp}, --micro-batch-size {micro_batch} and --global-batch-size"
                        f" {batch} do not divide.")  # fmt: skip
    chunks = args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_layers_per_virtual_pipeline_stage:
        chunks = max(1, args.num_layers // (pp * args.num_layers_per_virtual_pipeline_stage))
    schedule, group = _schedule_of(args, pp, chunks, count)
    if args.num_layers % (pp * chunks):
        raise UserError(f"--num-layers {args.num_layers} is no multiple of PP {pp} x {chunks} chunks.")
    sharding = "zero3" if args.use_torch_fsdp2 else "zero1" if args.use_distributed_optimizer else "replicated"
    recompute = args.recompute_granularity or ("selective" if args.recompute_activations else "none")
    sizes = (pp, tp, dp, chunks, micro_batch, count, group)
    plain = Strategy(schedule, *sizes, sharding, recompute, args.sequence_parallel, args.breadth_first_hop)
    if not plain.is_split:
        return plain
    return replace(plain, weight_lag=args.breadth_first_weight_lag, times=gpt_of(args).times(recompute))


def _schedule_of(args: argparse.Namespace, pp: int, chunks: int, count: int) -> tuple[str, int]:
    """Return the schedule by its word, and its group."""
    if pp == 1:
        return "no-pipeline", count
    if args.pipeline_schedule == "breadth-first":
        if chunks < 2:
            raise UserError("--pipeline-schedule breadth-first needs --num-virtual-stages-per-pipeline-rank 2 or more.")
        group = min(count, args.breadth_first_group_size or count)
    else:
        group = count if chunks == 1 else args.microbatch_group_size_per_virtual_pipeline_stage or pp
    gradients = args.breadth_first_weight_gradients
    if gradients == "auto":
        times = gpt_of(args).times(args.recompute_granularity or "none")
        order = PipelineShape(pp, chunks, count), group, args.breadth_first_backward == "eager"
        lags, _ = lags_for("auto", *order, args.breadth_first_weight_lag, args.breadth_first_hop, times)
        gradients = "with-backward" if lags is None else "deferred"
    backward = args.breadth_first_backward
    word = word_of(args.pipeline_schedule, pp, chunks, count, group, backward=backward, weight_gradients=gradients)
    if word not in SCHEDULES:
        raise UserError(f"bfpp plan does not know {word}: both --breadth-first-backward late and deferred weights'"
                        " gradients.\n  Leave out one of them.")  # fmt: skip
    return word, group

"""Reads a model, and how it is to be run, from Megatron's flags. Flags that say neither are passed over."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..console.errors import UserError
from ..schedule.names import word_of
from .model import GPT
from .strategy import Strategy

__all__ = ["batch_list", "gpt_of", "name_list", "number_list", "parse", "precision_of", "strategy_of"]

_REQUIRED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--vocab-size")
_SIZES = ("--ffn-hidden-size", "--num-query-groups", "--kv-channels", "--max-position-embeddings")
_PARALLEL = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"),
    *("--num-layers-per-virtual-pipeline-stage", "--micro-batch-size", "--global-batch-size"),
    *("--microbatch-group-size-per-virtual-pipeline-stage", "--breadth-first-group-size"),
)
_SWITCHES = (
    *("--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear", "--add-qkv-bias", "--qk-layernorm"),
    *(
        "--group-query-attention",
        "--sequence-parallel",
        "--use-distributed-optimizer",
        "--use-torch-fsdp2",
        "--bf16",
        "--fp16",
    ),
    *("--recompute-activations", "--fp8-param-gather"),
)
# What this model knows nothing of; estimates without it would be wrong.
_UNKNOWN = (
    *(
        "--num-experts",
        "--multi-latent-attention",
        "--mtp-num-layers",
        "--hybrid-layer-pattern",
        "--hybrid-override-pattern",
    ),
    *("--context-parallel-size", "--expert-model-parallel-size", "--pipeline-model-parallel-layout"),
    *(
        "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers",
        "--account-for-embedding-in-pipeline-split",
    ),
    *("--account-for-loss-in-pipeline-split", "--use-megatron-fsdp", "--recompute-modules"),
    *(
        "--fp4-format",
        "--first-last-layers-bf16",
        "--fp8-dot-product-attention",
        "--fp8-multi-head-attention",
        "--fp8-output-proj",
    ),
    "--activation-func-fp8-input-store",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"the model's flags: {message}.")


def parse(words: list[str]) -> argparse.Namespace:
    """Megatron's flags as far as they matter here. UserError for a value that is none, or a model that is not known."""
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    for flag in (*_REQUIRED, *_SIZES, *_PARALLEL):
        parser.add_argument(flag, type=int)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    parser.add_argument(
        "--position-embedding-type", choices=("learned_absolute", "rope", "none"), default="learned_absolute"
    )
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--recompute-granularity", choices=("selective", "full"))
    parser.add_argument("--recompute-method", choices=("uniform", "block"))
    parser.add_argument("--recompute-num-layers", type=int)
    parser.add_argument("--fp8-format", choices=("e4m3", "hybrid"))
    parser.add_argument("--fp8-recipe", default="delayed")
    parser.add_argument("--pipeline-schedule", choices=("1f1b", "breadth-first"), default="1f1b")
    parser.add_argument("--breadth-first-backward", choices=("eager", "late"), default="eager")
    args, rest = parser.parse_known_args(words)
    for flag, value in zip(rest, [*rest[1:], ""], strict=False):
        name = flag.split("=", 1)[0]
        value = flag.split("=", 1)[1] if "=" in flag else value
        if name in _UNKNOWN and not (name.endswith("-size") and value == "1"):
            raise UserError(f"{name} is not in the model of bfpp plan, which is a dense GPT with tensor, pipeline and data"
                            " parallelism.\n  Leave it out to plan without it.")  # fmt: skip
    if args.recompute_method == "block" or (args.recompute_num_layers or 1) != 1:
        raise UserError("bfpp plan knows full recomputation of every single layer only.\n"
                        "  Use --recompute-method uniform --recompute-num-layers 1.")  # fmt: skip
    _check_fp8(args)
    return args


def _check_fp8(args: argparse.Namespace) -> None:
    """Refuses what of fp8 the estimate does not know, and what Megatron refuses."""
    if args.fp8_format is None:
        if args.fp8_param_gather:
            raise UserError("--fp8-param-gather is for fp8.\n  Add --fp8-format hybrid, or leave it out.")
        return
    if args.fp8_recipe not in ("delayed", "tensorwise"):
        raise UserError(f"--fp8-recipe {args.fp8_recipe} is not in the model of bfpp plan, which knows one scale per tensor.\n"
                        "  Use --fp8-recipe delayed or tensorwise, or leave out --fp8-format to plan without fp8.")  # fmt: skip
    if args.fp16 or args.use_torch_fsdp2:
        wrong = "--fp16" if args.fp16 else "--use-torch-fsdp2"
        raise UserError(f"fp8 with {wrong} is not in the model of bfpp plan.\n  Leave out {wrong}, or --fp8-format.")
    if args.fp8_param_gather and not args.use_distributed_optimizer:
        raise UserError("--fp8-param-gather needs the distributed optimizer.\n  Add --use-distributed-optimizer.")


def gpt_of(args: argparse.Namespace) -> GPT:
    missing = [flag for flag in _REQUIRED if getattr(args, _name(flag)) is None]
    if missing:
        raise UserError(
            f"the model lacks {', '.join(missing)}.\n  Give a file of configs/, or Megatron's flags after --."
        )
    for flag in (*_REQUIRED, *_SIZES, "--make-vocab-size-divisible-by"):
        value = getattr(args, _name(flag))
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1.")
    grouped = args.group_query_attention
    return GPT(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        seq_length=args.seq_length,
        vocab_size=args.vocab_size,
        ffn_hidden_size=args.ffn_hidden_size or 0,
        num_query_groups=(args.num_query_groups or 1) if grouped else 0,
        kv_channels=args.kv_channels or 0,
        max_position_embeddings=args.max_position_embeddings or 0,
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
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


def precision_of(args: argparse.Namespace) -> str | None:
    """None where no flag says it. fp8: of the layers' matrix products; fp8-params: their parameters too."""
    if args.fp8_format is not None:
        return "fp8-params" if args.fp8_param_gather else "fp8"
    return "bf16" if args.bf16 else "fp16" if args.fp16 else None


def strategy_of(args: argparse.Namespace, num_gpus: int) -> Strategy:
    """How the flags say to run on so many GPUs. UserError where they do not say it, or where it does not divide."""
    pp, tp = args.pipeline_model_parallel_size or 1, args.tensor_model_parallel_size or 1
    micro_batch, batch = args.micro_batch_size or 1, args.global_batch_size
    if batch is None:
        raise UserError(
            "the flags do not say --global-batch-size.\n  Add it: a measured step was one of so many sequences."
        )
    if num_gpus % (pp * tp) or batch % (num_gpus // (pp * tp) * micro_batch):
        raise UserError(
            f"{num_gpus} GPUs, TP {tp}, PP {pp}, --micro-batch-size {micro_batch} and --global-batch-size {batch} do not divide."
        )
    dp = num_gpus // (pp * tp)
    count = batch // (dp * micro_batch)
    chunks = args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_layers_per_virtual_pipeline_stage:
        chunks = max(1, args.num_layers // (pp * args.num_layers_per_virtual_pipeline_stage))
    schedule, group = _schedule_of(args, pp, chunks, count)
    if args.num_layers % (pp * chunks):
        raise UserError(f"--num-layers {args.num_layers} is no multiple of PP {pp} x {chunks} chunks.")
    sharding = "zero3" if args.use_torch_fsdp2 else "zero1" if args.use_distributed_optimizer else "replicated"
    recompute = args.recompute_granularity or ("selective" if args.recompute_activations else "none")
    return Strategy(
        schedule, pp, tp, dp, chunks, micro_batch, count, group, sharding, recompute, args.sequence_parallel
    )


def _schedule_of(args: argparse.Namespace, pp: int, chunks: int, count: int) -> tuple[str, int]:
    """The schedule and its group."""
    if pp == 1:
        return "no-pipeline", count
    if args.pipeline_schedule == "breadth-first":
        if chunks < 2:
            raise UserError(
                "--pipeline-schedule breadth-first needs --num-virtual-stages-per-pipeline-rank 2 or more here."
            )
        group = min(count, args.breadth_first_group_size or count)
    else:
        group = count if chunks == 1 else args.microbatch_group_size_per_virtual_pipeline_stage or pp
    return word_of(args.pipeline_schedule, pp, chunks, count, group, backward=args.breadth_first_backward), group


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


# Lists, of bfpp plan's own flags


def batch_list(text: str | None, configured: int | None) -> list[int]:
    """Global batches: 64,128 or 64-512, which doubles from the first to the last; without a text what the model's flags say."""
    if text is None:
        if configured is None:
            raise UserError(
                "no global batch is given.\n  Add --global-batch, or --global-batch-size to the model's flags."
            )
        return [configured]
    first, dash, last = text.partition("-")
    if not dash:
        return list(number_list("--global-batch", text))
    if not (
        first.isascii()
        and first.isdigit()
        and last.isascii()
        and last.isdigit()
        and 0 < int(first) <= int(last) < 2**31
    ):
        raise UserError(f"--global-batch {text} is no range.\n  Write it as 64-512: from, to; doubling in between.")
    found = [int(first)]
    while found[-1] * 2 <= int(last):
        found.append(found[-1] * 2)
    return found


def number_list(flag: str, text: str | None) -> tuple[int, ...]:
    """Empty for no text."""
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and 0 < int(part) < 2**31 for part in parts):
        raise UserError(f"{flag} {text} is no list of numbers above 0.\n  Write it as 8 or 4,8.")
    return tuple(dict.fromkeys(map(int, parts)))


def name_list(flag: str, text: str | None, words: tuple[str, ...]) -> tuple[str, ...]:
    """Of these words. Empty for no text."""
    names = () if text is None else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in words:
            raise UserError(f"{flag} {name} does not exist.\n  Use one of {', '.join(words)}.")
    return names

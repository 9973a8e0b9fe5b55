"""The flags that matter here, parsed as Megatron parses them. The others are passed over, which one line says."""

import argparse
from difflib import get_close_matches
from typing import NoReturn

from ...console.errors import UserError
from ...console.numbers import at_least
from ...schedule.lower import DEFAULT_HOP
from .refused import is_named, refuse, uncounted

__all__ = ["parse"]

_NUMBERS = (
    "--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--vocab-size", "--ffn-hidden-size",
    "--kv-channels", "--max-position-embeddings", "--padded-vocab-size",
    "--q-lora-rank", "--num-experts", "--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size",
    "--moe-latent-size", "--mtp-num-layers", "--mamba-num-heads",
    "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage", "--global-batch-size",
    "--microbatch-group-size-per-virtual-pipeline-stage", "--breadth-first-group-size", "--recompute-num-layers",
    "--expert-tensor-parallel-size", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers",
)  # fmt: skip
_WITH_DEFAULTS = {
    "--tensor-model-parallel-size": 1, "--pipeline-model-parallel-size": 1, "--context-parallel-size": 1,
    "--expert-model-parallel-size": 1, "--micro-batch-size": 1, "--make-vocab-size-divisible-by": 128,
    "--kv-lora-rank": 32, "--qk-head-dim": 128, "--qk-pos-emb-head-dim": 64, "--v-head-dim": 128,
    "--num-query-groups": 1, "--moe-router-topk": 2, "--mamba-state-dim": 128, "--mamba-head-dim": 64,
    "--mamba-num-groups": 8, "--linear-conv-kernel-dim": 4, "--linear-key-head-dim": 128,
    "--linear-value-head-dim": 128, "--linear-num-key-heads": 16, "--linear-num-value-heads": 32,
}  # fmt: skip
_SWITCHES = (
    "--swiglu", "--quick-geglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear", "--add-qkv-bias",
    "--qk-layernorm", "--group-query-attention", "--attention-output-gate", "--sequence-parallel",
    "--use-distributed-optimizer", "--use-torch-fsdp2", "--use-megatron-fsdp", "--bf16", "--fp16",
    "--recompute-activations", "--fp8-param-gather", "--use-rotary-position-embeddings", "--multi-latent-attention",
    "--moe-shared-expert-gate", "--mtp-use-repeated-layer", "--first-last-layers-bf16",
    "--overlap-moe-expert-parallel-comm", "--moe-shared-expert-overlap", "--tp-comm-overlap",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split", "--use-precision-aware-optimizer", "--grad-reduce-in-bf16",
)  # fmt: skip
_WORDS: dict[str, tuple[tuple[str, ...], str | None]] = {  # flag: its choices, and its default
    "--normalization": (("LayerNorm", "RMSNorm"), "LayerNorm"),
    "--position-embedding-type": (("learned_absolute", "rope", "yarn", "mrope", "relative", "none"),
                                  "learned_absolute"),
    "--softmax-type": (("vanilla", "off-by-one", "learnable"), "vanilla"),
    "--recompute-granularity": (("selective", "full"), None),
    "--recompute-method": (("uniform", "block"), None),
    "--fp8-format": (("e4m3", "hybrid"), None),
    "--pipeline-schedule": (("1f1b", "breadth-first"), "1f1b"),
    "--breadth-first-backward": (("eager", "late"), "eager"),
    "--breadth-first-weight-gradients": (("with-backward", "deferred", "auto"), "with-backward"),
    "--moe-token-dispatcher-type": (("allgather", "alltoall", "flex"), "allgather"),
    "--data-parallel-sharding-strategy": (("no_shard", "optim", "optim_grads", "optim_grads_params"), "no_shard"),
}  # fmt: skip
_TEXTS = {
    "--moe-layer-freq": "1", "--linear-attention-freq": None, "--hybrid-layer-pattern": None,
    "--hybrid-override-pattern": None,
    "--mtp-hybrid-override-pattern": None, "--pipeline-model-parallel-layout": None, "--tokenizer-type": None,
    "--tokenizer-model": None, "--vocab-file": None, "--experimental-attention-variant": None,
    "--transformer-impl": "transformer_engine", "--fp8-recipe": "delayed",
}  # fmt: skip
_DTYPES = ("--main-grads-dtype", "--main-params-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype")
_LISTS = ("--recompute-modules", "--cp-comm-type", "--spec")
_ALIKE = 0.9  # of a misspelt flag and the one that is meant; none of Megatron's own is as near, but those of fp4
_SHOWN = 4  # names in the line of what is passed over


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"the model's flags: {message}.")


def parse(words: list[str]) -> argparse.Namespace:
    """Parse the flags that matter here; `notes` of the answer are lines about the rest and what was derived.

    Raises UserError for a wrong value, or for a job that cannot be planned.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    args.recompute_modules, args.cp_comm_type = (
        [part for word in found for part in word.strip("[]").replace(",", " ").split()]
        for found in (args.recompute_modules, args.cp_comm_type)
    )
    args.spec = " ".join(args.spec) or None
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    refuse(args, given, words)
    known = [flag for action in parser._actions for flag in action.option_strings]
    misspelt = _misspelt(given, known)
    args.notes = (
        list(misspelt.values()) + _passed_over([flag for flag in given if flag not in misspelt]) + uncounted(given)
    )
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    for flag in _NUMBERS:
        parser.add_argument(flag, type=at_least(1))
    for flag, number in _WITH_DEFAULTS.items():
        parser.add_argument(flag, type=at_least(1), default=number)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag, (choices, default) in _WORDS.items():
        parser.add_argument(flag, choices=choices, default=default)
    for flag, text in _TEXTS.items():
        parser.add_argument(flag, default=text)
    for flag in _DTYPES:
        parser.add_argument(flag, choices=("fp32", "bf16", "fp16", "fp8"), default="fp32")
    for flag in _LISTS:
        parser.add_argument(flag, nargs="+", default=[])
    for flag in ("--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16"):
        parser.add_argument(flag, type=at_least(0), default=1)
    parser.add_argument("--hidden-dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--breadth-first-hop", type=float, default=DEFAULT_HOP)
    parser.add_argument("--breadth-first-weight-lag", type=at_least(0))
    return parser


def _misspelt(given: list[str], known: list[str]) -> dict[str, str]:
    """Return a line for each flag that is not read, and nearly spelt as one that is."""
    near = {flag: get_close_matches(flag, known, 1, _ALIKE) for flag in given if not is_named(flag)}
    return {
        flag: f"passed over: {flag}, which has no effect here; is {meant[0]} meant?"
        for flag, meant in near.items()
        if meant and not flag.startswith("--fp4")
    }


def _passed_over(given: list[str]) -> list[str]:
    names = sorted(flag for flag in set(given) if not is_named(flag))
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"passed over, as the plan does not need them: {', '.join(names[:_SHOWN])}{more}"]

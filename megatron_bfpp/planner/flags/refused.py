"""What cannot be planned, and what is planned without a part that is named."""

import argparse

from ...console.errors import UserError

__all__ = ["OTHER_JOBS", "is_named", "refuse", "refuse_other_models", "uncounted"]

# flag: what it trains
_OTHER_MODELS = {
    "--encoder-num-layers": "an encoder beside the decoder (T5)",
    "--decoder-num-layers": "an encoder beside the decoder (T5)",
    "--bert-no-binary-head": "BERT",
    "--img-h": "a model that sees images",
    "--patch-dim": "a model that sees images",
    "--dataset-provider": "a model of several kinds of data (MIMO)",
}
# flag: why it is not planned, and what would be
_ELSEWHERE = {
    "--heterogeneous-layers-config-path": ("gives each layer sizes of its own, in a file that bfpp plan does not read.",
                                           "Give sizes that all layers share."),
    "--yaml-cfg": ("has the model in a file of another form, which bfpp plan does not read.",
                   "Give the model by Megatron's flags."),
}  # fmt: skip
# flag: the job that it is of, which trains nothing, or does more than to train
OTHER_JOBS = {
    "--num-tokens-to-generate": "inference",
    "--perform-rl-step": "reinforcement learning",
    "--export-kd-teacher-load": "distillation",
}
_VARIANTS = ("gated_delta_net",)
_SPECS = ("hybrid_stack_spec", "mamba_stack_spec")
# flag: what the estimate leaves out
_UNCOUNTED = {
    "--fine-grained-activation-offloading": "activations moved to the host",
    "--cpu-offloading": "activations moved to the host",
    "--optimizer-cpu-offload": "optimizer state moved to the host",
    "--export-kd-teacher-load": "the teacher of a distillation",
    "--export-kd-cfg": "the teacher of a distillation",
    "--window-size": "windows of attention, which it counts as whole",
    "--num-distributed-optimizer-instances": "several instances of the distributed optimizer: it divides among all",
    "--moe-expert-capacity-factor": "the experts' capacity: tokens are spread evenly",
    "--rampup-batch-size": "the smaller batches of the first steps",
    "--step-batch-size-schedule": "other batches than --global-batch-size",
    "--use-checkpoint-args": "what the checkpoint says of the model: the flags' sizes",
}
# flag: what a job does that is planned as a training step all the same
_NO_TRAINING = {
    "--num-tokens-to-generate": "runs inference: what is planned is a training step of its model",
    "--inference-dynamic-batching": "runs inference: what is planned is a training step of its model",
    "--perform-rl-step": "is reinforcement learning: what is planned is its training step, without the rollouts",
}
_OPTIMIZERS = {"muon": "Muon's own state, counted as Adam's", "dist_muon": "Muon's own state, counted as Adam's"}


def refuse(args: argparse.Namespace, given: list[str], words: list[str]) -> None:
    """Raise UserError for a job that cannot be planned. given: the flags that are no part of `args`."""
    refuse_other_models(given, words)
    for flag in given:
        if flag in _ELSEWHERE:
            raise UserError(f"{flag} {_ELSEWHERE[flag][0]}\n  {_ELSEWHERE[flag][1]}")
    variant = args.experimental_attention_variant
    if variant is not None and variant not in _VARIANTS:
        raise UserError(f"--experimental-attention-variant {variant} is not in the model of bfpp plan.\n"
                        f"  It knows {' and '.join(_VARIANTS)}, and what the other flags make.")  # fmt: skip
    if args.spec not in (None, "local") and not any(known in args.spec for known in _SPECS):
        raise UserError(f"--spec {args.spec} builds layers that bfpp plan does not know.\n"
                        "  Leave it out to plan Megatron's own.")  # fmt: skip
    if args.recompute_granularity == "full" and (args.recompute_method == "block" or _layers_at_once(args) != 1):
        raise UserError("bfpp plan knows full recomputation of every single layer only.\n"
                        "  Use --recompute-method uniform --recompute-num-layers 1.")  # fmt: skip
    _check_fp8(args, given)


def refuse_other_models(given: list[str], words: list[str]) -> None:
    """Raise UserError for a model that is no decoder of text, or is several."""
    if "--flextron" in given:
        raise UserError("--flextron trains several sizes of one model, of which a router chooses for each batch;"
                        " megatron_bfpp counts one.\n  Leave out --flextron for its largest size.")  # fmt: skip
    for flag in given:
        if flag in _OTHER_MODELS:
            raise UserError(f"{flag} trains {_OTHER_MODELS[flag]}; megatron_bfpp knows decoders of text alone.")
    if any("bert" in word.lower().rpartition("/")[2] for word in _values(words, "--data-path", "--vocab-file")):
        raise UserError("the data or the vocabulary are BERT's; megatron_bfpp knows decoders of text alone.")


def _layers_at_once(args: argparse.Namespace) -> int:
    return args.recompute_num_layers or 1


def _values(words: list[str], *flags: str) -> list[str]:
    found, takes = [], False
    for word in words:
        if word.startswith("--"):
            takes = word in flags
        elif takes:
            found.append(word)
    return found


def _check_fp8(args: argparse.Namespace, given: list[str]) -> None:
    """Refuse uses of fp8 that the estimate does not cover, and those that Megatron refuses."""
    for flag in ("--fp4-format", "--fp8-dot-product-attention", "--fp8-multi-head-attention", "--fp8-output-proj",
                 "--activation-func-fp8-input-store"):  # fmt: skip
        if flag in given:
            raise UserError(f"{flag} is not in the model of bfpp plan.\n  Leave it out to plan without it.")
    if args.fp8_format is None:
        if args.fp8_param_gather:
            raise UserError("--fp8-param-gather is for fp8.\n  Add --fp8-format hybrid, or leave it out.")
        return
    if args.fp8_recipe not in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        raise UserError(f"--fp8-recipe {args.fp8_recipe} is not in the model of bfpp plan.\n"
                        "  Use delayed, tensorwise, blockwise or mxfp8, or leave out --fp8-format.")  # fmt: skip
    if args.fp16 or args.use_torch_fsdp2:
        wrong = "--fp16" if args.fp16 else "--use-torch-fsdp2"
        raise UserError(f"fp8 with {wrong} is not in the model of bfpp plan.\n  Leave out {wrong}, or --fp8-format.")
    if args.fp8_param_gather and not (args.use_distributed_optimizer or args.use_megatron_fsdp):
        raise UserError("--fp8-param-gather needs the distributed optimizer.\n  Add --use-distributed-optimizer.")


def uncounted(given: list[str]) -> list[str]:
    """Return a line about a job that does not train, or not alone; and one about what the estimate leaves out."""
    others = {_NO_TRAINING[flag]: flag for flag in given if flag in _NO_TRAINING}
    lines = [f"this job {what} ({flag})" for what, flag in others.items()]
    named = dict.fromkeys(f"{_UNCOUNTED[flag]} ({flag})" for flag in given if flag in _UNCOUNTED)
    return lines + ([f"not counted: {'; '.join(named)}"] if named else [])


def is_named(flag: str) -> bool:
    """Return whether a line says what becomes of a flag that is not read."""
    return flag in _UNCOUNTED or flag in _NO_TRAINING

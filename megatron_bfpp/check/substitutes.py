"""Changes of Megatron's arguments for a machine without data, tokenizer and GPU; each is reported."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..console.errors import UserError
from ..integration.cpu.arguments import cpu_arguments, switch_off
from ..integration.seams import changed
from ..schedule.model.vocabulary import words_of
from .local_layers import VARIANT

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_DATA_LISTS = ("data_args_path", "per_split_data_args_path")  # files that name the data
_TOKENIZER = ("vocab_file", "merge_file", "tokenizer_model")

# Arguments that make Megatron write, connect or wait, with the value that keeps it from that.
_OUTPUTS: tuple[tuple[str, Any], ...] = (
    ("tensorboard_dir", None),
    ("wandb_project", ""),
    ("enable_one_logger", False),
    ("log_progress", False),
    ("log_energy", False),
    ("async_save", False),
    ("adlr_autoresume", False),
    ("exit_signal_handler", False),
    ("exit_signal_handler_for_training", False),
)


@contextmanager
def unknown_words_in(passes_over: str) -> Iterator[list[str]]:
    """Let a parser pass over words that it does not know, if there is a reason to: a line of the list names them."""
    lines: list[str] = []
    if not passes_over:
        yield lines
        return
    rest: list[str] = []
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = parse(*args, **kwargs)
        rest.extend(word.partition("=")[0] for word in unknown if word.startswith("--"))
        return found, []

    with changed(argparse.ArgumentParser, parse_known_args=parse_known):
        yield lines
    lines += [f"passed over {', '.join(dict.fromkeys(rest))}: {passes_over}"] if rest else []


def without_other_jobs(args: Any) -> list[str]:
    """Leave out what makes the job more than training, or its model another than the flags'; return a line for each.

    Raises UserError where a checkpoint alone says what the model is.
    """
    lines = []
    if args.use_checkpoint_args:
        if args.hidden_size is None:
            raise UserError("--use-checkpoint-args takes the model from a checkpoint, which a dry run does not read.\n"
                            "  Leave it out and give the model with Megatron's flags.")  # fmt: skip
        lines.append("no --use-checkpoint-args: the model is that of the flags, and a checkpoint is not read")
        args.use_checkpoint_args = False
    if getattr(args, "perform_rl_step", False):
        lines.append("no --perform-rl-step: the training step is checked, and not the rollouts")
        args.perform_rl_step = False
    return lines


def before_validation(args: Any, tokenizer: str | None) -> list[str]:
    """Replace data and tokenizer that are not here, lest they hide what else may be wrong; return a line for each.

    tokenizer: the type that the flags name. Raises UserError for layers that cannot be built here.
    """
    if (variant := getattr(args, "experimental_attention_variant", None)) not in (None, VARIANT):
        raise UserError(f"--experimental-attention-variant {variant} has layers of Transformer Engine alone, which need"
                        " CUDA: bfpp check cannot build them.")  # fmt: skip
    return _spec(args) + _mock_data(args) + _null_tokenizer(args, tokenizer)


def _spec(args: Any) -> list[str]:
    """Take "MODULE NAME" for two words, as Megatron's recipes of inference write it."""
    given = getattr(args, "spec", None) or []
    if len(given) != 1 or len(given[0].split()) != 2:
        return []
    args.spec = given[0].split()
    return [f"--spec {given[0]} as two words"]


def _mock_data(args: Any) -> list[str]:
    missing = _missing_data(args)
    if args.mock_data or missing is None:
        return []
    for name in (*_DATA, *_DATA_LISTS):
        if getattr(args, name, None) is not None:
            setattr(args, name, None)
    args.mock_data = True
    return [f"--mock-data in place of {missing}"]


def _missing_data(args: Any) -> str | None:
    for name in _DATA:
        for prefix in getattr(args, name, None) or []:
            if _is_weight(prefix):
                continue
            if "://" in prefix or not all(os.path.exists(prefix + ending) for ending in (".idx", ".bin")):
                return f"{_flag(name)} {prefix}, which is not here"
    for name in _DATA_LISTS:
        path = getattr(args, name, None)
        if path is not None and not os.path.exists(path):
            return f"{_flag(name)} {path}, which is not here"
    return None


def _is_weight(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def _null_tokenizer(args: Any, named: str | None) -> list[str]:
    """Put NullTokenizer in place of a tokenizer whose files are not all here: with the words of --vocab-size, or with
    as many as `bfpp plan` takes for it.
    """
    kind = args.tokenizer_type
    if kind is None or kind.startswith("Null"):
        return []
    given: dict[str, str] = {name: getattr(args, name) for name in _TOKENIZER if getattr(args, name, None) is not None}
    missing = [f"{_flag(name)} {path}" for name, path in given.items() if not os.path.exists(path)]
    if given and not missing:
        return []
    why = f"{missing[0]} is not here" if missing else "its files are not given"
    size, whose = args.vocab_size or getattr(args, "padded_vocab_size", None), ""
    if size is None:
        size, whose = words_of(named, args.tokenizer_model, args.vocab_file)
        whose = f" ({whose}; -- --vocab-size N behind the file gives another)"
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    args.tokenizer_type = "NullTokenizer"
    for name in given:
        setattr(args, name, None)
    args.vocab_size = 2 * size - NullTokenizer(size).vocab_size  # that of 0.17 adds one for the end of a document
    return [f"--tokenizer-type NullTokenizer with its {size} words{whose} in place of {kind}: {why}"]


def after_validation(args: Any) -> list[str]:
    """Switch off what Megatron accepted for GPUs and this machine cannot build; return a line for each change.

    Parameters and placement do not depend on it.
    """
    # Not reported: the process groups are fake, and no data is loaded.
    args.distributed_backend, args.num_workers = "gloo", 0
    lines = [f"built without {flag}, which needs CUDA" for flag in switch_off(args)]
    lines += [f"built with {line}" for line in cpu_arguments(args)]
    if args.multi_latent_attention or args.context_parallel_size > 1:
        what = "latent attention" if args.multi_latent_attention else "context parallelism"
        lines.append(f"built with a core of the attention that does not run {what}: it has the same parameters")
    if args.multi_latent_attention and args.tensor_model_parallel_size > 1:
        lines.append("built with the projections to the latents divided over TP, as Transformer Engine's are not")
    lines += _dispatcher(args)
    for name, value in _OUTPUTS:
        if hasattr(args, name):
            setattr(args, name, value)
    args.fake_process_group, args.use_gloo_process_groups, args.init_model_with_meta_device = True, False, True
    return lines


def _dispatcher(args: Any) -> list[str]:
    """Put Megatron's own exchange of tokens among experts in place of one whose library need not be here."""
    if getattr(args, "moe_token_dispatcher_type", None) != "flex":
        return []
    args.moe_token_dispatcher_type = "alltoall"
    for name, off in (("moe_enable_deepep", False), ("moe_expert_rank_capacity_factor", None)):
        if hasattr(args, name):
            setattr(args, name, off)
    return ["built with --moe-token-dispatcher-type alltoall: flex needs DeepEP or HybridEP"]


@contextmanager
def attention_of_any_kind() -> Iterator[None]:
    """Let Megatron's own core of the attention be built for latent attention and context parallelism, which only
    Transformer Engine's runs. Its parameters, if any, are the same.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init = DotProductAttention.__init__

    def build(self: Any, config: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        with changed(config, context_parallel_size=1):
            init(self, config, *args, **kwargs)

    with changed(DotProductAttention, __init__=build):
        yield


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

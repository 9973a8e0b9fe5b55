"""Changes of Megatron's arguments for a machine without data, tokenizer and GPU; each is reported."""

import os
from typing import Any

from ..console.errors import UserError
from ..integration.cpu.arguments import cpu_arguments, switch_off

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


def before_validation(args: Any) -> list[str]:
    """Replace data and tokenizer that are not here, lest they hide what else may be wrong; return a line for each.

    Raises UserError where the size of the vocabulary is not known.
    """
    return _mock_data(args) + _null_tokenizer(args)


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


def _null_tokenizer(args: Any) -> list[str]:
    """Put NullTokenizer with --vocab-size words in place of a tokenizer whose files are not all here."""
    kind = args.tokenizer_type
    if kind is None or kind.startswith("Null"):
        return []
    given: dict[str, str] = {name: getattr(args, name) for name in _TOKENIZER if getattr(args, name, None) is not None}
    missing = [f"{_flag(name)} {path}" for name, path in given.items() if not os.path.exists(path)]
    if given and not missing:
        return []
    why = f"{missing[0]} is not here" if missing else "its files are not given"
    if args.vocab_size is None:
        raise UserError(
            f"--tokenizer-type {kind}: {why}, so the size of the vocabulary is not known.\n"
            "  Add --vocab-size N, or run where the tokenizer's files are."
        )
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    args.tokenizer_type = "NullTokenizer"
    for name in given:
        setattr(args, name, None)
    size = args.vocab_size
    args.vocab_size -= NullTokenizer(size).vocab_size - size  # that of 0.17 adds one for the end of a document
    return [f"--tokenizer-type NullTokenizer with its {size} words in place of {kind}: {why}"]


def after_validation(args: Any) -> list[str]:
    """Switch off what Megatron accepted for GPUs and this machine cannot build; return a line for each change.

    Parameters and placement do not depend on it.
    """
    # Not reported: the process groups are fake, and no data is loaded.
    args.distributed_backend, args.num_workers = "gloo", 0
    lines = [f"built without {flag}, which needs CUDA" for flag in switch_off(args)]
    lines += [f"built with {line}" for line in cpu_arguments(args)]
    for name, value in _OUTPUTS:
        if hasattr(args, name):
            setattr(args, name, value)
    args.fake_process_group, args.use_gloo_process_groups, args.init_model_with_meta_device = True, False, True
    return lines


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

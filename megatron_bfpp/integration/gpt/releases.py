"""Plain GPT pretraining through Megatron's own trainer, whose call differs between the releases."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ...console.errors import UserError

ARGS_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}  # as in Megatron's own script

# What Megatron's own script does beyond plain pretraining: flag -> the value that means it is not asked for.
# A flag that a release does not have is not asked for.
OTHER_TASKS: dict[str, Any] = {
    "--sft": False,
    "--fim-data": False,
    "--hybrid-context-parallel": False,
    "--dataloader-inter-document-masking": False,
    "--logits-load-dir": None,
    "--logits-save-dir": None,
    "--perform-rl-step": False,
    "--use-legacy-models": False,
}
# From 0.19 on the trainer builds the model itself, these kinds included; before, the builders of integration/gpt/model.py do.
OTHER_MODELS: dict[str, Any] = {
    "--experimental-attention-variant": None,
    "--heterogeneous-layers-config-path": None,
    "--record-memory-history": False,
}


def train() -> None:
    """Train as sys.argv says. Everything of Megatron is imported here, after the launcher has prepared the process."""
    program_start = time.time()
    if int(os.environ.get("RANK", "0")) != 0:  # one rank's warnings are enough
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.arguments import parse_args

    release = _release_of(pretrain)
    # Megatron 0.17 parses inside pretrain(), after the process groups; parsed here too, a refusal comes first everywhere.
    refuse_other_tasks(parse_args(), with_model_kinds=release is not _pretrain_019)

    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    release(wrapped, store)


def refuse_other_tasks(args: Namespace, with_model_kinds: bool) -> None:
    """Raise UserError for the first flag that asks for more than this entry point does."""
    for flag, off in (OTHER_TASKS | OTHER_MODELS if with_model_kinds else OTHER_TASKS).items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), off)
        if value != off:
            raise UserError(
                f"{flag} is not plain GPT pretraining, which is all that megatron_bfpp.pretrain_gpt does.\n"
                "  Leave it out, or start the script of a Megatron-LM checkout with it:\n"
                f"  torchrun ... -m megatron_bfpp.run pretrain_gpt.py {flag} ..."
            )


def _release_of(pretrain: Callable[..., None]) -> Callable[..., None]:
    # By the signature and not by the version: development builds between releases carry the next release's number.
    parameters = inspect.signature(pretrain).parameters
    if "cfg_container" not in parameters:
        return _pretrain_017
    return _pretrain_018 if parameters["model_provider"].default is inspect.Parameter.empty else _pretrain_019


def _pretrain_017(pretrain: Callable[..., None], store: Any) -> None:
    """0.17: pretrain() parses the command line."""
    from megatron.core.enums import ModelType

    from . import script
    from .model import build_gpt

    pretrain(
        script.datasets,
        build_gpt,
        ModelType.encoder_or_decoder,
        script.forward_step,
        args_defaults=ARGS_DEFAULTS,
        store=store,
        get_embedding_ranks=script.embedding_ranks,
    )


def _pretrain_018(pretrain: Callable[..., None], store: Any) -> None:
    """0.18: the caller parses, pretrain() takes the configuration and still a model provider."""
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from . import script
    from .model import build_gpt

    args = parse_and_validate_args(args_defaults=ARGS_DEFAULTS)
    with warnings.catch_warnings():  # it recommends a configured model, which 0.18 has for hybrid models only
        warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig")
        configuration = pretrain_cfg_container_from_args(args)
    pretrain(
        configuration,
        script.datasets,
        build_gpt,
        ModelType.encoder_or_decoder,
        script.forward_step,
        store=store,
        get_embedding_ranks=script.embedding_ranks,
    )


def _pretrain_019(pretrain: Callable[..., None], store: Any) -> None:
    """0.19: the configuration holds the model too, and the trainer builds it."""
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from . import script

    args = parse_and_validate_args(args_defaults=ARGS_DEFAULTS)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        script.datasets,
        ModelType.encoder_or_decoder,
        script.forward_step,
        store=store,
        get_embedding_ranks=script.embedding_ranks,
    )

"""Plain pretraining of a GPT or a hybrid model through Megatron's own trainer, whose call differs between releases."""

import inspect
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ...console.errors import UserError
from ...schedule.model.pattern import is_hybrid
from .. import relied_on

ARGS_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}  # as in Megatron's own script

# Flags that ask Megatron's own script for more than plain pretraining, and the value that means they do not.
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
# From 0.19 on the trainer builds the model itself, these kinds included; before, gpt/model.py does.
OTHER_MODELS: dict[str, Any] = {
    "--experimental-attention-variant": None,
    "--heterogeneous-layers-config-path": None,
    "--record-memory-history": False,
}


def train(hybrid: bool = False) -> None:
    """Train a GPT, or a hybrid model, as sys.argv says.

    Everything of Megatron is imported here, after the launcher has prepared the process.
    """
    program_start = time.time()
    if int(os.environ.get("RANK", "0")) != 0:  # one rank's warnings are enough
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    relied_on.check(relied_on.ENTRY_POINT)
    if hybrid:
        relied_on.check(relied_on.HYBRID_ENTRY_POINT)
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.arguments import parse_args

    # By the signature and not by the version: development builds between releases carry the next release's number.
    parameters = inspect.signature(pretrain).parameters
    takes_config = "cfg_container" in parameters  # from 0.18 on
    builds_model = takes_config and parameters["model_provider"].default is not inspect.Parameter.empty  # from 0.19 on
    # 0.17 parses inside pretrain(), after the process groups; parsed here too, a refusal comes first everywhere.
    args = parse_args()
    _refuse_other_models(args, hybrid)
    refuse_other_tasks(args, with_model_kinds=not builds_model)

    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    _pretrain(wrapped, store, takes_config, builds_model, hybrid)


def refuse_other_tasks(args: Namespace, with_model_kinds: bool) -> None:
    """Raise UserError for the first flag that asks for more than this entry point does."""
    for flag, off in (OTHER_TASKS | OTHER_MODELS if with_model_kinds else OTHER_TASKS).items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"), off)
        if value != off:
            kind, script = ("hybrid", "pretrain_hybrid") if is_hybrid(args) else ("GPT", "pretrain_gpt")
            raise UserError(
                f"{flag} is not plain {kind} pretraining, which is all that megatron_bfpp.{script} does.\n"
                "  Leave it out, or start the script of a Megatron-LM checkout with it:\n"
                f"  torchrun ... -m megatron_bfpp.run {script}.py {flag} ..."
            )


def _refuse_other_models(args: Namespace, wanted: bool) -> None:
    """Raise UserError for a hybrid model's pattern without its entry point, and the other way round."""
    if is_hybrid(args) and not wanted:
        raise UserError(
            "--hybrid-layer-pattern is of hybrid models, and megatron_bfpp.pretrain_gpt trains a GPT.\n"
            "  Start megatron_bfpp.pretrain_hybrid with it, or leave it out."
        )
    if wanted and not is_hybrid(args):
        raise UserError(
            "megatron_bfpp.pretrain_hybrid needs the layers of the model, as --hybrid-layer-pattern '*-*-*-*-'.\n"
            "  Add it, or start megatron_bfpp.pretrain_gpt."
        )


def _pretrain(pretrain: Callable[..., None], store: Any, takes_config: bool, builds_model: bool, hybrid: bool) -> None:
    """Call Megatron's trainer.

    0.17 parses the command line itself. From 0.18 on the caller does, and passes a configuration. Until 0.18 the caller
    builds the model; from 0.19 on the configuration says which, and the trainer builds it.
    """
    from megatron.core.enums import ModelType

    from . import script

    given: list[Any] = [script.datasets]
    more: dict[str, Any] = {"store": store}
    if not hybrid:  # whose script leaves Megatron's default
        more["get_embedding_ranks"] = script.embedding_ranks
    if not builds_model:
        from .model import build_gpt, build_hybrid

        given.append(build_hybrid if hybrid else build_gpt)
    given += [ModelType.encoder_or_decoder, script.forward_step]
    if takes_config:
        from megatron.training import argument_utils
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(args_defaults=ARGS_DEFAULTS)
        model_of = "hybrid_config_from_args" if hybrid else "gpt_config_from_args"
        models = [getattr(argument_utils, model_of)(args)] if builds_model else []
        with warnings.catch_warnings():  # 0.18 recommends a configured model, which it has for hybrid models only
            warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig")
            given.insert(0, argument_utils.pretrain_cfg_container_from_args(args, *models))
    else:
        more["args_defaults"] = ARGS_DEFAULTS
    relied_on.ENTRY_POINT.seams[0].check_call(*given, **more)
    pretrain(*given, **more)

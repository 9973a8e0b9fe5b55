"""Build the model for megatron-core 0.17 and 0.18, whose trainers take a builder; the trainer of 0.19 has its own."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.mamba import MambaModel  # the name of HybridModel in 0.17; 0.18 has both
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.yaml_arguments import core_transformer_config_from_yaml

__all__ = ["build_gpt", "build_hybrid"]

_SAME_NAMES = ("fp16_lm_cross_entropy", "position_embedding_type", "rotary_percent", "rotary_base")


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Build one model chunk, with the embedding if pre_process and the loss if post_process."""
    args = get_args()
    print_rank_0("building GPT model ...")
    config = config or _config(args)
    layer_spec, mtp_spec = _specs(args, config, vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        mtp_block_spec=mtp_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        **{name: getattr(args, name) for name in _SAME_NAMES},
    )


def build_hybrid(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build one model chunk of the layers that --hybrid-layer-pattern names; as build_gpt otherwise."""
    args = get_args()
    print_rank_0("building hybrid model ...")
    return MambaModel(
        config or _config(args),
        mamba_stack_spec if args.spec is None else import_module(args.spec),
        args.padded_vocab_size,
        args.max_position_embeddings,
        args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        **{name: getattr(args, name) for name in _SAME_NAMES},
    )


def _config(args: Any) -> Any:
    if args.yaml_cfg is not None:
        return core_transformer_config_from_yaml(args, "language_model")
    return core_transformer_config_from_args(args)


def _specs(args: Any, config: Any, vp_stage: int | None) -> tuple[Any, Any]:
    """Return the specs of this chunk's layers and of its multi-token prediction block, which repeats the last layer."""
    use_te = args.transformer_impl == "transformer_engine"
    choices = {"normalization": args.normalization, "qk_l2_norm": args.qk_l2_norm, "vp_stage": vp_stage}
    model_layers = get_gpt_decoder_layer_specs(config, use_te, **choices)
    if args.spec is not None:
        layer_spec = import_module(args.spec)
    elif args.num_experts:
        layer_spec = get_gpt_decoder_block_spec(config, use_te, **choices)
    else:  # all layers of a dense model are alike; given one, the chunk takes as many as it holds
        layer_spec = model_layers[-1]
    if args.mtp_num_layers is None:
        return layer_spec, None
    return layer_spec, get_gpt_mtp_block_spec(
        config, model_layers[-1], use_transformer_engine=use_te, vp_stage=vp_stage
    )

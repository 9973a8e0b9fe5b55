"""What hybrid models rely on beside the schedule: their layers on a CPU, and their entry point. Rows: see rows.py."""

from .entry_point import PRETRAIN
from .rows import Part, called, there, wrapped

_SPECS = "megatron.core.models.mamba.mamba_layer_specs"
_MIXER = "megatron.core.ssm.mamba_mixer"
_GDN = "megatron.core.ssm.gated_delta_net"
_LAYER = "it describes the layers of a hybrid model without Transformer Engine"
_KERNELS = "its kernels take CUDA tensors only"

HYBRID_ON_CPU = Part(
    "hybrid models on a CPU", "use --device cuda",
    (
        there(_SPECS, "mamba_stack_spec", _LAYER),
        there("megatron.core.fusions.fused_bias_dropout", "get_bias_dropout_add", _LAYER),
        called("megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec", "", _LAYER),
        called("megatron.core.models.gpt.moe_module_specs", "get_moe_module_spec", "use_te num_experts", _LAYER),
        called("megatron.core.transformer.spec_utils", "ModuleSpec", "module submodules", _LAYER),
        called(
            "megatron.core.transformer.transformer_layer", "TransformerLayerSubmodules",
            "input_layernorm self_attention self_attn_bda pre_mlp_layernorm mlp mlp_bda sharded_state_dict_keys_map",
            _LAYER,
        ),
        called(
            "megatron.core.transformer.multi_token_prediction", "MultiTokenPredictionLayerSubmodules",
            "enorm hnorm eh_proj mtp_model_layer layer_norm", _LAYER,
        ),
        called(
            "megatron.core.ssm.mamba_layer", "MambaLayerSubmodules", "norm mixer mamba_bda sharded_state_dict_keys_map",
            _LAYER,
        ),
        called(_MIXER, "MambaMixerSubmodules", "in_proj out_proj", _LAYER),
        wrapped(_MIXER, "MambaMixer", "config submodules", "it makes a Mamba layer", reads=("HAVE_MAMBA_SSM",)),
        wrapped(_MIXER, "MambaMixer.forward", "hidden_states", "it mixes a sequence"),
        there(_MIXER, "ExtendedRMSNorm", _KERNELS),
        there(_MIXER, "mamba_split_conv1d_scan_combined", _KERNELS),
        called(_GDN, "GatedDeltaNetSubmodules", "in_proj out_norm out_proj", _LAYER),
        wrapped(_GDN, "GatedDeltaNet", "config submodules", "it makes a Gated Delta Net layer"),
        called(
            "megatron.core.transformer.utils", "make_sharded_tensors_for_checkpoint",
            "state_dict prefix tensor_parallel_layers_axis_map sharded_offsets tp_group dp_cp_group",
            "it saves a norm of Mamba layers",
        ),
    ),
)  # fmt: skip
HYBRID_ENTRY_POINT = Part(
    "the entry point of hybrid models", "start the pretrain_hybrid.py of a checkout with -m megatron_bfpp.run",
    (
        called(
            "megatron.training.argument_utils", "hybrid_config_from_args", "args", "it describes the model",
            only_if=(PRETRAIN, "cfg_container"),
        ),
        there("megatron.core.transformer.spec_utils", "ModuleSpec", "it describes the layers"),
        there("megatron.core.models.mamba", "MambaModel", "it makes the model of older releases"),
        there(_SPECS, "mamba_stack_spec", "it describes the layers"),
    ),
)  # fmt: skip

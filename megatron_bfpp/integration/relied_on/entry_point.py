"""What the GPT entry point, -m megatron_bfpp.pretrain_gpt, relies on in Megatron's trainer, data and model."""

from .rows import Part, called, there, wrapped

_ARGUMENTS = "megatron.training.arguments"
_UTILS = "megatron.training.utils"
_CORE = "megatron.core.utils"
_SPECS = "megatron.core.models.gpt.gpt_layer_specs"
_STATE = "megatron.core.parallel_state"
_RERUN = "megatron.core.rerun_state_machine"
_MTP = "megatron.core.transformer.multi_token_prediction"
_START, _DATA, _MODEL = "it starts the trainer", "it makes the data sets", "it makes the model of older releases"
_BATCH, _LOSS = "it makes a micro-batch", "it judges a loss"

PRETRAIN = wrapped(
    "megatron.training", "pretrain", "model_provider model_type forward_step_func store get_embedding_ranks", _START
)
ENTRY_POINT = Part(
    "the GPT entry point", "start the pretrain_gpt.py of a Megatron-LM checkout with -m megatron_bfpp.run",
    (
        PRETRAIN,
        called(_ARGUMENTS, "parse_args", "", _START),
        called(_ARGUMENTS, "parse_and_validate_args", "args_defaults", _START, only_if=(PRETRAIN, "cfg_container")),
        called(
            "megatron.training.argument_utils", "pretrain_cfg_container_from_args", "args", _START,
            only_if=(PRETRAIN, "cfg_container"),
        ),
        called(
            "megatron.training.argument_utils", "gpt_config_from_args", "args", _START,
            only_if=(PRETRAIN, "model_provider_func"),
        ),
        called("megatron.training", "set_startup_timestamps", "program_start main_entry", _START),
        called(
            "megatron.training.inprocess_restart", "maybe_wrap_for_inprocess_restart", "pretrain", _START
        ),
        there("megatron.core.enums", "ModelType.encoder_or_decoder", _START),
        called("megatron.training", "get_args", "", _BATCH),
        called("megatron.training", "get_timers", "", _BATCH),
        called("megatron.training", "print_rank_0", "message", _DATA),
        called(_ARGUMENTS, "core_transformer_config_from_args", "args", _DATA),
        called(_UTILS, "get_blend_and_blend_per_split", "args", _DATA),
        called(_UTILS, "is_first_or_last_pipeline_stage", "vp_stage", _BATCH),
        called(
            "megatron.core.datasets.blended_megatron_dataset_builder", "BlendedMegatronDatasetBuilder",
            "cls sizes is_built_on_rank config", _DATA,
        ),
        there("megatron.core.datasets.gpt_dataset", "GPTDataset", _DATA),
        there("megatron.core.datasets.gpt_dataset", "MockGPTDataset", _DATA),
        wrapped(
            "megatron.core.datasets.gpt_dataset", "GPTDatasetConfig",
            "random_seed sequence_length blend blend_per_split path_to_cache tokenizer create_attention_mask "
            "fast_cache_load sequences_per_dataset defer_npy_index_mmap sequence_parallel_size "
            "hybrid_context_parallel split multiple_validation_sets full_validation num_dataset_builder_threads "
            "mmap_bin_files reset_position_ids reset_attention_mask eod_mask_loss object_storage_cache_path "
            "mid_level_dataset_surplus allow_ambiguous_pad_tokens context_parallel_size data_parallel_size", _DATA,
        ),
        called("megatron.core.tokenizers.utils.build_tokenizer", "build_tokenizer", "args", _DATA),
        there("megatron.core", "mpu", _BATCH),
        called(_STATE, "get_tensor_model_parallel_rank", "", _BATCH),
        called(_STATE, "get_tensor_model_parallel_src_rank", "", _BATCH),
        called(_STATE, "is_pipeline_first_stage", "", _BATCH),
        called(_STATE, "is_pipeline_last_stage", "", _BATCH),
        wrapped(
            _CORE, "get_batch_on_this_tp_rank", "mtp_on_this_rank", _BATCH, also_in=(_UTILS,)
        ),
        wrapped(_CORE, "get_batch_on_this_cp_rank", "batch", _BATCH),
        called(_CORE, "get_attr_wrapped_model", "model attr", _BATCH),
        there(_CORE, "StragglerDetector", _BATCH),
        called(_MTP, "get_mtp_ranks", "pp_ranks config", "it finds the ranks with embeddings"),
        wrapped(_MTP, "mtp_on_this_rank", "ignore_virtual vp_stage", _BATCH),
        called(_RERUN, "get_rerun_state_machine", "", _LOSS),
        called(
            _RERUN, "RerunStateMachine.validate_result", "result rejection_func message tolerance fatal", _LOSS
        ),
        called(_RERUN, "RerunStateMachine.is_unexpectedly_large", "result threshold context", _LOSS),
        called(
            "megatron.core.models.gpt", "GPTModel",
            "config transformer_layer_spec mtp_block_spec vocab_size max_sequence_length pre_process post_process "
            "parallel_output share_embeddings_and_output_weights rope_scaling vp_stage pg_collection "
            "fp16_lm_cross_entropy position_embedding_type rotary_percent rotary_base", _MODEL,
        ),
        called(
            _SPECS, "get_gpt_decoder_layer_specs",
            "config use_transformer_engine normalization qk_l2_norm vp_stage", _MODEL,
        ),
        called(
            _SPECS, "get_gpt_decoder_block_spec",
            "config use_transformer_engine normalization qk_l2_norm vp_stage", _MODEL,
        ),
        called(_SPECS, "get_gpt_mtp_block_spec", "config spec use_transformer_engine vp_stage", _MODEL),
        called("megatron.core.transformer.spec_utils", "import_module", "module_path", _MODEL),
        called(
            "megatron.training.yaml_arguments", "core_transformer_config_from_yaml", "args", _MODEL
        ),
    ),
)  # fmt: skip

"""What the code reads whose place the plugin takes, by release. Made by scripts/known_names.py."""

# A place, and by release the names beside those of all releases, which stand under "all".
NAMES: dict[str, dict[str, str]] = {
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving": {
        "all": (
            "ExitStack Module P2PCommunicator __enter__ __exit__ b_virtual_microbatch_id backward_step "
            "barrier_with_L1_time batch_p2p_comm calculate_per_token_loss check_first_val_step "
            "checkpoint_activations_microbatch clear_embedding_activation_buffer collect_non_loss_data "
            "combined_1f1b_schedule_for_interleaved_pipelining cp cp_group_size create_cudagraphs cuda_graph_impl "
            "current_microbatch deallocate_output_tensor deallocate_pipeline_outputs enter_context "
            "f_virtual_microbatch_id finalize_model_grads_func fine_grained_activation_offloading "
            "finish_embedding_wgrad_compute force_all_reduce forward_only forward_step get_model_config "
            "get_model_type get_pipeline_model_parallel_group get_pp_rank_microbatches get_schedule_table "
            "grad_sync_func hidden_size input_tensor_grad is_first_microbatch is_last_stage is_pp_first_stage "
            "is_pp_last_stage is_vp_first_stage is_vp_last_stage log_level microbatch_group_size_per_vp_stage nn "
            "no_sync_func nullcontext num_microbatches_with_partial_activation_checkpoints nvtx_range_pop "
            "nvtx_range_push output_tensor overlap_moe_expert_parallel_comm overlap_p2p_comm "
            "overlap_p2p_comm_warmup_flush p2p_communicator parallel_state param_sync_func parameters partial "
            "pg_collection post_backward post_forward pp_group pre_backward pre_forward rank recv_backward "
            "recv_forward recv_next recv_prev send_backward_recv_backward "
            "send_forward_backward_recv_forward_backward send_forward_recv_forward send_next send_prev "
            "sequence_parallel size start stop tensor_shape timers torch tp virtual_microbatch_id "
            "virtual_pipeline_model_parallel_size vp_size vp_stage wait zeros"
        ),
        "0.17.1": (
            "CudaGraphScope ProcessGroupCollection check_initialized cuda_graph_scope dp_cp embd full_iteration "
            "get_context_parallel_group get_data_parallel_group get_embedding_group get_position_embedding_group "
            "get_tensor_model_parallel_group off_interface partial_data_parallel pos_embd pp reset "
            "with_context_parallel"
        ),
        "0.18.2": (
            "ProcessGroupCollection check_initialized dp_cp embd get_context_parallel_group "
            "get_data_parallel_group get_embedding_group get_position_embedding_group "
            "get_tensor_and_data_parallel_group get_tensor_model_parallel_group moe_paged_stash off_interface "
            "paged_stash_reset partial_data_parallel pos_embd pp reset tp_dp_cp with_context_parallel"
        ),
        "0.19.2": "_build_default_pg_collection moe_paged_stash off_interface paged_stash_reset reset",
        "main d98e8a64": "_build_default_pg_collection _reset_activation_offload moe_paged_stash paged_stash_reset",
    },
    "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward": {
        "all": (
            "HAVE_TE __fsdp_param__ all_reduce allreduce_dgrad async_op bfloat16 cuda current_device "
            "dist_all_gather_func dist_reduce_scatter_func distributed dtype empty float16 float32 "
            "fused_weight_gradient_mlp_cuda get_dummy_wgrad get_global_memory_buffer get_main_grad get_tensor "
            "grad_added_to_main_grad grad_output_buffer gradient_accumulation_fusion main_grad matmul "
            "prepare_input_tensors_for_wgrad_compute requires_grad saved_tensors sequence_parallel shape size t "
            "torch tp_group use_bias wait wgrad_deferral_limit wgrad_gemm_accum_fp16 wgrad_gemm_accum_fp32 "
            "zero_out_wgrad zeros"
        ),
        "0.17.1": "",
        "0.18.2": "megatron.core.extensions.transformer_engine out_dtype te_general_gemm",
        "0.19.2": (
            "all_gather_and_prefetch_bwd gtp_remat_size megatron.core.extensions.transformer_engine out_dtype "
            "te_general_gemm wgrad_reduce_scatter"
        ),
        "main d98e8a64": (
            "_wgrad_gemm all_gather_and_prefetch_bwd get_wgrad_tensor gtp_remat_size input_dtype to "
            "use_zero_copy_wgrad wgrad_reduce_scatter"
        ),
    },
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.start_grad_sync": {
        "all": "bucket_groups expert_parallel_bucket_groups start_grad_sync",
        "0.17.1": "",
        "0.18.2": "",
        "0.19.2": "",
        "main d98e8a64": "",
    },
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.start_param_sync": {
        "all": "bucket_groups expert_parallel_bucket_groups force_sync overlap_param_gather_with_optimizer_step",
        "0.17.1": (
            "buckets copy_ data ddp_config is_float8tensor overlap_param_gather param_data param_to_index params "
            "post_all_gather_processing reuse_grad_buf_for_mxfp8_param_ag shape start_param_sync view zero_"
        ),
        "0.18.2": "_start_bucket_group_param_sync",
        "0.19.2": "_start_bucket_group_param_sync",
        "main d98e8a64": "_start_bucket_group_param_sync",
    },
}


def known(module: str, name: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """Return (release, all names that the code at a place reads) of the tested releases."""
    found = NAMES[f"{module}:{name}"]
    return tuple(
        (release, frozenset((found["all"] + " " + more).split())) for release, more in found.items() if release != "all"
    )

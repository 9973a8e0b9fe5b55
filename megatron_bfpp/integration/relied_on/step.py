"""What a breadth-first step relies on in Megatron-Core and torch, always or with a flag. Rows: see rows.py."""

from .rows import Part, called, redone, replaced, there, wrapped

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_STATE = "megatron.core.parallel_state"
_UTILS = "megatron.core.utils"
_LAYERS = "megatron.core.tensor_parallel.layers"
_DDP = "megatron.core.distributed.distributed_data_parallel"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_GRAPHS = "megatron.core.transformer.cuda_graphs"
_BLOCK = "megatron.core.transformer"
_INTERLEAVED = "forward_backward_pipelining_with_interleaving"
_CALL = (
    "forward_step_func data_iterator model num_microbatches seq_length micro_batch_size decoder_seq_length "
    "forward_only collect_non_loss_data first_val_step adjust_tensor_shapes_fn p2p_communicator pg_collection "
    "force_all_reduce"
)

SCHEDULE = replaced(
    _SCHEDULES, _INTERLEAVED,
    _CALL, "it is the schedule that breadth-first takes the place of",
)  # fmt: skip
ORDER = replaced(
    _SCHEDULES,
    "get_schedule_table",
    "num_microbatches num_model_chunks microbatch_group_size_per_vp_stage",
    "it tells whoever records forwards in which order they run, as verl does",
)
COMPILE = called("megatron.core.datasets.utils", "compile_helpers", "", "it compiles what data sets need at the start")
INITIALIZE = wrapped(
    _STATE,
    "initialize_model_parallel",
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size",
    "it is where all ranks have met and compare",
)

STEP = Part(
    "every step", "",
    (
        SCHEDULE,
        ORDER,
        INITIALIZE,
        there(_SCHEDULES, "get_forward_backward_func", "it looks the schedule up at each call", _INTERLEAVED),
        called(
            _SCHEDULES, "forward_step",
            "forward_step_func data_iterator model num_microbatches input_tensor forward_data_store config "
            "cp_group_size collect_non_loss_data checkpoint_activations_microbatch is_first_microbatch "
            "current_microbatch vp_stage is_last_stage", "it is the forward of a micro-batch",
        ),
        called(
            _SCHEDULES, "backward_step", "input_tensor output_tensor output_tensor_grad config",
            "it is the backward of a micro-batch",
        ),
        called(
            _SCHEDULES, "check_first_val_step", "first_val_step forward_only cond",
            "it tells chunks which micro-batch is their first",
        ),
        called(
            _SCHEDULES, "deallocate_output_tensor", "out deallocate_pipeline_outputs", "it frees an output that is sent"
        ),
        called(
            _SCHEDULES, "clear_embedding_activation_buffer", "config model is_last_stage",
            "it begins a step with --defer-embedding-wgrad-compute",
        ),
        called(
            _SCHEDULES, "finish_embedding_wgrad_compute", "config embedding_module is_last_stage tp_group",
            "it ends a step with --defer-embedding-wgrad-compute",
        ),
        called(_SCHEDULES, "_build_default_pg_collection", "", "it makes a step's groups",
            only_if=(SCHEDULE, "_build_default_pg_collection")),
        called(_SCHEDULES, "paged_stash_reset", "enabled config", "it begins a step of experts",
            only_if=(SCHEDULE, "paged_stash_reset")),
        called(
            _SCHEDULES, "_reset_activation_offload", "pg_collection", "it ends a step that offloads activations",
            only_if=(SCHEDULE, "_reset_activation_offload"),
        ),
        called(
            _SCHEDULES, "off_interface.reset", "", "it ends a step that offloads activations",
            only_if=(SCHEDULE, "off_interface"),
        ),
        called(_UTILS, "get_model_config", "model", "it finds a chunk's configuration"),
        called(_UTILS, "nvtx_range_push", "msg", "it names an action under --nvtx-ranges"),
        called(_UTILS, "nvtx_range_pop", "msg", "it names an action under --nvtx-ranges"),
        there(_UTILS, "_nvtx_enabled", "it says whether --nvtx-ranges is given"),
        there(_UTILS, "MakeViewlessTensor", "it gives a CUDA graph's output another tensor"),
        COMPILE,
        wrapped(
            "megatron.core.transformer.transformer_config", "TransformerConfig",
            "bf16 calculate_per_token_loss deallocate_pipeline_outputs expert_model_parallel_size "
            "finalize_model_grads_func grad_sync_func hidden_size moe_router_topk no_sync_func num_moe_experts "
            "num_microbatches_with_partial_activation_checkpoints overlap_moe_expert_parallel_comm overlap_p2p_comm "
            "param_sync_func pipeline_dtype pipeline_model_parallel_size sequence_parallel timers "
            "barrier_with_L1_time variable_seq_lengths", "it holds what a step asks of the configuration",
        ),
        there(
            "megatron.core.pipeline_parallel.p2p_communication", "P2PCommunicator", "it holds a caller's group",
            "pp_group",
        ),
        wrapped(
            "megatron.core.process_groups_config", "ProcessGroupCollection", "tp cp pp embd pos_embd dp_cp tp_dp_cp",
            "it holds a step's groups",
        ),
        called(_STATE, "get_tensor_model_parallel_group", "", "it is a step's group"),
        called(_STATE, "get_context_parallel_group", "", "it is a step's group"),
        called(_STATE, "get_embedding_group", "check_initialized", "it is a step's group"),
        called(_STATE, "get_position_embedding_group", "check_initialized", "it is a step's group"),
        called(_STATE, "get_pipeline_model_parallel_group", "", "it is a step's group"),
        called(
            _STATE, "get_data_parallel_group", "with_context_parallel partial_data_parallel", "it is a step's group"
        ),
        called(_STATE, "get_tensor_and_data_parallel_group", "with_context_parallel", "it is a step's group"),
        called(
            _STATE, "create_group", "ranks timeout backend pg_options use_local_synchronization group_desc",
            "it makes the groups for messages",
        ),
        called(_STATE, "get_nccl_options", "pg_name nccl_comm_cfgs", "it makes NCCL's options for messages"),
        there(
            "torch.distributed.distributed_c10d", "_process_group_name", "it gives the groups for messages their names",
            "_hash_ranks_to_str",
        ),
        called("torch.distributed.distributed_c10d", "_hash_ranks_to_str", "ranks", "it names the groups for messages"),
        there("torch.nn", "Module", "it is what a chunk must be"),
        called(
            "megatron.core.num_microbatches_calculator", "get_num_microbatches", "", "it counts a step's micro-batches"
        ),
        there(
            _DDP, "DistributedDataParallel", "it reduces and gathers what the plan says",
            "bucket_groups expert_parallel_bucket_groups ddp_config force_all_reduce param_to_bucket_group "
            "overlap_param_gather_with_optimizer_step remove_forward_pre_hook_handles overlap_grad_reduce "
            "overlap_param_gather", also_in=("megatron.core.distributed",),
        ),
        there("megatron.core.distributed", "DistributedDataParallel", "it is how chunks with replicas are known"),
        wrapped(
            "megatron.core.distributed", "DistributedDataParallelConfig",
            "num_distributed_optimizer_instances overlap_grad_reduce overlap_param_gather",
            "it says how Megatron reduces and gathers",
        ),
        there(
            _BUFFERS, "_ParamAndGradBucketGroup", "it is what the plan reduces and gathers",
            "grad_reduce_handle is_first_batch per_param_grad_ready_counts params",
        ),
        called(_BUFFERS, "_ParamAndGradBucketGroup.start_grad_sync", "", "it reduces the gradients of a bucket"),
        called(_BUFFERS, "_ParamAndGradBucketGroup.start_param_sync", "", "it gathers the parameters of a bucket"),
        called(
            _BUFFERS, "_ParamAndGradBucketGroup.register_grad_ready", "param force_all_reduce",
            "it counts the gradients that a bucket waits for",
        ),
        there(
            "megatron.core.distributed", "TorchFullyShardedDataParallel", "it is how fully sharded chunks are known"
        ),
        there(_BLOCK + ".cuda_graphs", "CudaGraphManager", "it is how a layer with CUDA graphs is known"),
        there("megatron.core.transformer.moe.router", "Router", "its weights' gradients are never deferred"),
    ),
)  # fmt: skip

PLACEMENT = Part(
    "the placement", "",
    (
        called(
            _BLOCK + ".transformer_block", "get_num_layers_to_build", "config vp_stage pp_rank",
            "it says how many layers a stage has",
        ),
        called(
            _BLOCK + ".transformer_layer", "get_transformer_layer_offset", "config vp_stage pp_rank",
            "it says with which layer a stage begins",
        ),
        called(
            _BLOCK + ".pipeline_parallel_layer_layout", "PipelineParallelLayerLayout",
            "layout pipeline_model_parallel_size", "it reads --pipeline-model-parallel-layout",
        ),
        called(
            _BLOCK + ".pipeline_parallel_layer_layout", "PipelineParallelLayerLayout.validate_layer_layout",
            "num_layers mtp_num_layers", "it checks --pipeline-model-parallel-layout",
        ),
        there(_STATE, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", "it tells a layout on which rank it is"),
        there(
            _STATE, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", "it tells a layout how many chunks a rank has"
        ),
    ),
)  # fmt: skip

_HYBRID = "megatron.core.models.hybrid.hybrid_layer_allocation"
_OLDER = "megatron.core.ssm.mamba_hybrid_layer_allocation"
HYBRID = Part(
    "hybrid patterns", "leave out --hybrid-layer-pattern",
    (
        called(_HYBRID, "parse_hybrid_pattern", "pattern", "it reads --hybrid-layer-pattern", also_in=(_OLDER,)),
        called(
            _HYBRID, "select_pipeline_segment", "main_pattern pp_group vp_stage first_stage_layers last_stage_layers",
            "it says which layers of --hybrid-layer-pattern a stage has", also_in=(_OLDER,),
            reads=(
                "torch", "distributed", "get_rank", "get_world_size", "log_on_each_pipeline_stage", "log_single_rank",
            ),
        ),
    ),
)  # fmt: skip

PLAN = Part(
    "engine plan", "use --breadth-first-engine megatron, which runs Megatron's own loop",
    (
        redone(_SCHEDULES, _INTERLEAVED, _CALL, "the plugin's step does its work itself"),
        redone(
            _DDP, "DistributedDataParallel.start_grad_sync", "", "the plugin launches the reductions of a chunk itself"
        ),
        redone(
            _DDP, "DistributedDataParallel.start_param_sync", "force_sync force_dispatch",
            "the plugin launches the gathers of a chunk itself",
        ),
    ),
)  # fmt: skip

LOOP = Part(
    "engine megatron", "use --breadth-first-engine plan",
    (
        there(
            _SCHEDULES, _INTERLEAVED, "it takes the group and the warm-up that the plugin gives it",
            "get_pp_rank_microbatches microbatch_group_size_per_vp_stage overlap_p2p_comm_warmup_flush",
        ),
        wrapped(
            _SCHEDULES, "get_pp_rank_microbatches", "num_microbatches num_model_chunks",
            "it counts the forwards before the first backward",
        ),
        wrapped(
            "megatron.core.model_parallel_config", "ModelParallelConfig",
            "microbatch_group_size_per_vp_stage overlap_p2p_comm_warmup_flush", "it holds the group of the loop",
        ),
    ),
)  # fmt: skip

DEFERRED = Part(
    "split backwards", "leave out --breadth-first-weight-gradients",
    (
        redone(
            _LAYERS, "LinearWithGradAccumulationAndAsyncCommunication.backward", "grad_output",
            "the plugin computes a linear layer's gradients itself",
        ),
        there(
            _LAYERS, "LinearWithGradAccumulationAndAsyncCommunication.forward",
            "it keeps what the plugin's backward of a linear layer needs",
            "save_for_backward use_bias gradient_accumulation_fusion allreduce_dgrad sequence_parallel "
            "grad_output_buffer tp_group main_grad",
        ),
        called(_LAYERS, "custom_bwd", "bwd", "it prepares a backward for autocast"),
        there(_LAYERS, "ColumnParallelLinear", "its weight's gradient is deferred", "tp_group sequence_parallel"),
        there(_LAYERS, "RowParallelLinear", "its weight's gradient is deferred", "tp_group"),
        there(_LAYERS, "VocabParallelEmbedding", "its gradient is never deferred"),
        there("torch._C", "_current_graph_task_id", "it tells one backward from the next"),
    ),
)  # fmt: skip

GRAPHS = Part(
    "CUDA graphs", "use --cuda-graph-impl none",
    (
        there(_GRAPHS, "CudaGraphManager", "it holds a layer's graphs", "cudagraph_runners training"),
        called(_GRAPHS, "create_cudagraphs", "", "it captures the graphs"),
        there(_GRAPHS, "_CudagraphGlobalRecord.cudagraph_created", "it says whether graphs are captured"),
    ),
)  # fmt: skip

"""What the plugin relies on in megatron.training: the command line, logs, traces and the entry point. See rows.py."""

from .assertion import Assertion
from .cpu import INITIALIZE
from .rows import Part, called, there, wrapped

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_LOOP = "forward_backward_pipelining_with_interleaving"
_STATE = "megatron.core.parallel_state"
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_TRAINING = "megatron.training.training"
_ARGUMENTS = "megatron.training.arguments"
_CHECKPOINTING = "megatron.training.checkpointing"

ADD_ARGUMENTS = wrapped(_ARGUMENTS, "add_megatron_arguments", "parser", "it takes the plugin's flags")
VALIDATE_ARGS = wrapped(_ARGUMENTS, "validate_args", "args defaults", "it completes the command line")
VALIDATE_YAML = wrapped(
    "megatron.training.yaml_arguments", "validate_yaml", "args defaults", "it completes a --yaml-cfg"
)
TRAIN_STEP = wrapped(_TRAINING, "train_step", "forward_step_func", "it is what the watchdog times")
TRACED_STEP = wrapped(
    _TRAINING, "train_step", "forward_step_func model config forward_backward_func", "it is what a trace records"
)
# Its first call in a rank that saves starts a process of 0.5 GB.
RESULTS_QUEUE = wrapped(
    "megatron.core.dist_checkpointing.strategies.filesystem_async", "get_write_results_queue", "mp_mode",
    "it starts a helper process that ends with its rank",
)  # fmt: skip
TRAINING_LOG = wrapped(
    _TRAINING, "training_log", "loss_dict iteration grad_norm", "it is where a step's losses are known"
)
SETUP = wrapped(_TRAINING, "setup_model_and_optimizer", "model_type", "it is where a run's files begin")
DATA_ITERATORS = wrapped(_TRAINING, "build_train_valid_test_data_iterators", "", "its failure ends up in a run's files")
TRAIN = wrapped(_TRAINING, "train", "forward_step_func model config", "it is where a run's files end")
PARAMETER_IDS = wrapped(
    "megatron.core.dist_checkpointing.optimizer", "get_optim_param_to_id_map", "optim_params_iter",
    "it numbers a sharded optimizer's parameters",
)  # fmt: skip
LOAD_CHECKPOINT = wrapped(
    _CHECKPOINTING, "load_checkpoint", "ddp_model optimizer skip_load_to_model_and_opt",
    "it restores a sharded optimizer",
)  # fmt: skip
SHARDING_WRAPPER = wrapped(
    "megatron.core.distributed.torch_fully_sharded_data_parallel", "TorchFullyShardedDataParallel.__init__", "module",
    "it shards a chunk, layer by layer", reads=("_fsdp_modules",),
)  # fmt: skip
NO_PIPELINE = Assertion(
    _ARGUMENTS, "validate_args", "it refuses FSDP2 with pipeline ranks, in one assertion that breadth-first leaves out",
    condition="args.use_torch_fsdp2", test="args.pipeline_model_parallel_size == 1",
)  # fmt: skip

COMMAND_LINE = Part(
    "the trainer", "",
    (
        ADD_ARGUMENTS,
        VALIDATE_ARGS,
        VALIDATE_YAML,
        there(_ARGUMENTS, "parse_args", "it asks for the plugin's flags", "add_megatron_arguments"),
        there("megatron.training.global_vars", "_GLOBAL_ARGS", "it holds the command line"),
        INITIALIZE,
        TRAIN_STEP,
        there(_TRAINING, "train", "it calls what the watchdog times", "train_step get_forward_backward_func"),
        RESULTS_QUEUE,
        there("torch.distributed.distributed_c10d", "PrefixStore", "it is where ranks compare"),
        there("torch.distributed.distributed_c10d", "_get_default_store", "it is where ranks compare"),
    ),
)  # fmt: skip

LOGS = Part(
    "logs and charts", "leave out --bfpp-run-dir, --bfpp-log-communication, "
    "BFPP_STEP_LOG, --tensorboard-dir and --wandb-project",
    (
        TRAINING_LOG,
        SETUP,
        DATA_ITERATORS,
        TRAIN,
        called(_TRAINING, "num_floating_point_operations", "args batch_size", "it counts a step's operations"),
        called("megatron.training.global_vars", "get_tensorboard_writer", "", "it takes the charts"),
        called("megatron.training.global_vars", "get_wandb_writer", "", "it takes the charts"),
    ),
)  # fmt: skip

TRACES = Part(
    "traces", "leave out --bfpp-trace-steps",
    (
        TRACED_STEP,
        wrapped(_SCHEDULES, "forward_step", "vp_stage current_microbatch", "it is a forward of Megatron's own loop"),
        wrapped(
            _SCHEDULES, "backward_step", "input_tensor output_tensor", "it is a backward of Megatron's own loop"
        ),
        there(_SCHEDULES, _LOOP, "it calls what is traced of Megatron's own loop", "forward_step backward_step"),
        called(_STATE, "get_data_parallel_rank", "with_context_parallel", "it finds the first replica"),
        called(_STATE, "get_tensor_model_parallel_rank", "", "it finds the first replica"),
        wrapped(_BUFFERS, "_ParamAndGradBucketGroup.finish_param_sync", "", "it waits for gathered parameters"),
        wrapped(_BUFFERS, "_ParamAndGradBucketGroup.finish_grad_sync", "", "it waits for reduced gradients"),
    ),
)  # fmt: skip

SHARDED = Part(
    "FSDP2", "leave out --use-torch-fsdp2",
    (
        NO_PIPELINE,
        SHARDING_WRAPPER,
        there("megatron.core.transformer.transformer_layer", "TransformerLayer", "it is sharded by itself"),
        PARAMETER_IDS,
        LOAD_CHECKPOINT,
        there(
            "torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState", "it holds a module's groups of parameters",
            "_fsdp_param_groups",  # pytorch PR 173509
        ),
        called(
            "megatron.core.transformer.mlp", "apply_swiglu_sharded_factory", "original_sh_ten sharded_offsets",
            "it saves gated layers",
        ),
    ),
    first_torch="2.12",
)  # fmt: skip

"""What the CPU mode relies on: the names of Megatron that it replaces. Rows: see rows.py."""

from .rows import Part, called, there, wrapped

_OPTIMIZER = "megatron.core.optimizer"
_NORM = "megatron.core.transformer.torch_norm"
_ATTENTION = "megatron.core.transformer.dot_product_attention"
_KERNELS = "its kernels take CUDA tensors only"

INITIALIZE = wrapped(
    "megatron.training.initialize", "initialize_megatron", "allow_no_cuda", "it starts Megatron without CUDA"
)
INITIALIZE_BRIDGE = wrapped(
    "megatron.bridge.training.initialize", "initialize_megatron", "allow_no_cuda",
    "it starts Megatron-Bridge without CUDA",
)  # fmt: skip
CPU = Part(
    "the CPU mode", "use --device cuda",
    (
        wrapped(_NORM, "WrappedTorchNorm.__new__", "config", "it makes a norm"),
        wrapped("megatron.core.extensions.transformer_engine", "TENorm.__new__", "config hidden_size eps",
            "it makes the last norm of a hybrid model"),
        there("megatron.core.extensions.transformer_engine", "HAVE_TE", "it says whether that norm can be made"),
        there(_ATTENTION, "DotProductAttention", "it is the attention of a CPU"),
        wrapped(_ATTENTION, "DotProductAttention.__init__", "config", "it makes an attention",
            reads=("attn_mask_type", "pg_collection")),
        wrapped(_ATTENTION, "DotProductAttention.forward", "query key value attention_mask", "it attends"),
        there("megatron.core.transformer.enums", "AttnMaskType.causal", "it is the mask of a GPT"),
        there(
            "megatron.core.distributed.torch_fully_sharded_data_parallel", "DeviceMesh",
            "it is made for CUDA by Megatron's FSDP2",
        ),
        wrapped(
            "megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu",
            "tensor as_numpy record_stream", "it gives the dispatcher its counts of tokens",
        ),
        wrapped(
            "megatron.core.tensor_parallel.layers", "reduce_from_tensor_model_parallel_region", "input_ group",
            "it sums over tensor-parallel ranks",
        ),
        there(
            "megatron.core.transformer.multi_token_prediction", "MultiTokenPredictionLayer",
            "it asks for classes of Transformer Engine",
        ),
        called(
            "megatron.core.tensor_parallel.mappings", "gather_from_sequence_parallel_region", "input_ group",
            "it gathers keys and values over context-parallel ranks",
        ),
        wrapped(
            "megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "new_state device graph_safe",
            "it sets a generator of CUDA",
        ),
        there(_OPTIMIZER, "Adam", _KERNELS),
        there(_OPTIMIZER, "SGD", _KERNELS),
        there(_OPTIMIZER, "USING_PYTORCH_OPTIMIZER", "it says whose arguments Adam takes"),
        there(_OPTIMIZER + ".distrib_optimizer", "HAVE_APEX_OR_TE", "it says whose state Adam has"),
        there(_OPTIMIZER + ".distrib_optimizer", "Adam", _KERNELS),
        wrapped(
            _OPTIMIZER + ".distrib_optimizer", "DistributedOptimizer._set_main_param_and_optimizer_states",
            "model_param tensors", "it loads a sharded optimizer",
        ),
        there(_OPTIMIZER + ".optimizer", "multi_tensor_applier", _KERNELS),
        there(_OPTIMIZER + ".optimizer", "multi_tensor_scale_impl", _KERNELS),
        there(_OPTIMIZER + ".clip_grads", "multi_tensor_applier", _KERNELS),
        there(_OPTIMIZER + ".clip_grads", "l2_norm_impl", _KERNELS),
        there(_OPTIMIZER + ".clip_grads", "multi_tensor_scale_impl", _KERNELS),
        there("megatron.core.utils", "local_multi_tensor_applier", "it does the kernels' work"),
        there("megatron.core.utils", "local_multi_tensor_scale", "it does the kernels' work"),
        there("megatron.core.utils", "local_multi_tensor_l2_norm", "it does the kernels' work"),
        there("torch.utils.data.dataloader", "_BaseDataLoaderIter.__next__", "it draws from the CPU's generator"),
        called("torch.compiler", "set_stance", "stance", "it switches the compiler off"),
    ),
)  # fmt: skip

"""Megatron's arguments that a CPU needs different, and those that it cannot serve. Standard library only.

Covers the names of megatron-core 0.17.1, 0.18.2 and 0.19.2; a name that a release lacks is passed over.
"""

import argparse
from typing import Any

from ...console.errors import UserError
from ...schedule.model.pattern import letters_of

__all__ = ["cpu_arguments", "switch_off"]

# argument, value a CPU needs, flag that sets it, reason. The results of training do not depend on them.
_CHANGES: tuple[tuple[str, Any, str, str], ...] = (
    ("distributed_backend", "gloo", "--distributed-backend gloo", "NCCL needs CUDA"),
    ("transformer_impl", "local", "--transformer-impl local", "Transformer Engine needs CUDA"),
    ("gradient_accumulation_fusion", False, "--no-gradient-accumulation-fusion", "a CUDA kernel of Apex"),
    ("no_persist_layer_norm", True, "--no-persist-layer-norm", "a CUDA kernel of Apex"),
    ("masked_softmax_fusion", False, "--no-masked-softmax-fusion", "a CUDA kernel"),
    ("apply_rope_fusion", False, "--no-rope-fusion", "a CUDA kernel of Transformer Engine"),
    ("cross_entropy_fusion_impl", "native", "--cross-entropy-fusion-impl native", "Transformer Engine needs CUDA"),
    ("ddp_average_in_collective", False, "no --ddp-average-in-collective", "gloo sums, it does not average"),
    ("pipeline_model_parallel_comm_backend", None, "no --pipeline-model-parallel-comm-backend", "gloo serves all"),
    ("nccl_communicator_config_path", None, "no --nccl-communicator-config-path", "NCCL needs CUDA"),
    ("high_priority_stream_groups", [], "no --high-priority-stream-groups", "a CPU has no streams"),
    ("num_workers", 0, "--num-workers 0", "no forked data loaders beside gloo's threads"),
)

# Arguments whose flag has another name, or that have another way out than to leave the flag out: flag, what to do.
_INSTEAD = {
    "fp8": ("--fp8-format", "use --bf16, or no precision flag"),
    "fp4": ("--fp4-format", "use --bf16, or no precision flag"),
    "optimizer_cpu_offload": ("--optimizer-cpu-offload", "leave it out: the optimizer is on the CPU already"),
    "cpu_offloading_num_layers": ("--cpu-offloading-num-layers", "leave it out: activations are on the CPU already"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "use --use-distributed-optimizer"),
    "nccl_ub": ("--use-nccl-ub", "leave it out"),
}
# argument, flag, what to do instead. True, a string or a number other than 0 asks for the feature.
_REFUSALS: tuple[tuple[str, str, str], ...] = tuple(
    (name, *_INSTEAD.get(name, ("--" + name.replace("_", "-"), "leave it out")))
    for name in (
        *("fp8", "fp8_param_gather", "fp4", "fp4_param_gather", "te_precision_config_file", "te_rng_tracker"),
        *("use_te_activation_func", "use_kitchen", "use_precision_aware_optimizer", "optimizer_cpu_offload"),
        *("cpu_offloading_num_layers", "fine_grained_activation_offloading", "delay_wgrad_compute", "tp_comm_overlap"),
        *("fused_residual_rmsnorm", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"),
        *("overlap_moe_expert_parallel_comm", "enable_cuda_graph", "external_cuda_graph", "optimizer_cuda_graph"),
        *("use_megatron_fsdp", "nccl_ub", "use_sharp", "record_memory_history", "log_device_memory_used"),
        "inprocess_restart",
    )
)

# Modules of Megatron whose specs of a hybrid stack are Transformer Engine's; the kinds of layers that have others.
_HYBRID_SPECS = ("megatron.core.models.hybrid.hybrid_layer_specs", "megatron.core.models.mamba.mamba_layer_specs")
_HYBRID_LAYERS = "*-EMG"


def cpu_arguments(args: argparse.Namespace) -> list[str]:
    """Change parsed arguments, before Megatron validates them, so that they run on a CPU; one line per change.

    Raises UserError for the first flag that asks for what a CPU cannot do.
    """
    for name, flag, instead in _REFUSALS:
        if getattr(args, name, None):
            _refuse(flag, instead)
    if getattr(args, "transformer_impl", None) == "inference_optimized":
        _refuse("--transformer-impl inference_optimized", "use --transformer-impl local")
    if getattr(args, "cuda_graph_impl", None) not in (None, "none"):
        _refuse(f"--cuda-graph-impl {args.cuda_graph_impl}", "leave it out")
    if getattr(args, "context_parallel_size", 1) > 1 and getattr(args, "window_size", None):
        _refuse("--window-size with --context-parallel-size", "leave out one of the two")
    if getattr(args, "profile", False) and not getattr(args, "use_pytorch_profiler", False):
        _refuse("--profile", "add --use-pytorch-profiler: Nsight's range needs CUDA")
    lines = []
    for name, value, flag, reason in _CHANGES:
        if getattr(args, name, value) != value:
            setattr(args, name, value)
            lines.append(f"{flag}: {reason}")
    return lines + _hybrid_spec(args)


def _hybrid_spec(args: argparse.Namespace) -> list[str]:
    """Name the spec of local layers for a hybrid model, unless the user has one of their own."""
    letters = letters_of(args)
    if not letters or (args.spec is not None and args.spec[0] not in _HYBRID_SPECS):
        return []
    others = sorted(set(letters) - set(_HYBRID_LAYERS + "|"))
    if others:
        has = f"layers {', '.join(_HYBRID_LAYERS)} alone, or give --spec with layers of your own"
        _refuse(f"layer {others[0]} of --hybrid-layer-pattern {letters}", f"use {has}")
    args.spec = ["megatron_bfpp.integration.cpu.hybrid", "LAYERS"]
    return [f"--spec {' '.join(args.spec)}: Transformer Engine needs CUDA, and so do the kernels of Mamba layers"]


# Of a dry run: argument, its value without the feature, flag. Parameters do not depend on them.
_FOR_GPUS: tuple[tuple[str, Any, str], ...] = (
    ("cuda_graph_impl", "none", "--cuda-graph-impl"),
    ("window_size", None, "--window-size"),
    ("profile", False, "--profile"),
    ("apply_layernorm_1p", False, "--apply-layernorm-1p"),
    ("layernorm_zero_centered_gamma", False, "--apply-layernorm-1p"),  # its name since 0.19
    ("memory_efficient_layer_norm", False, "--memory-efficient-layer-norm"),
    ("defer_embedding_wgrad_compute", False, "--defer-embedding-wgrad-compute"),
)


def switch_off(args: argparse.Namespace) -> list[str]:
    """Switch off in validated arguments what `cpu_arguments` refuses, for a dry run; return one line per flag."""
    lines = []
    modules = getattr(args, "recompute_modules", None) or []
    if "moe_act" in modules and getattr(args, "moe_grouped_gemm", False):  # without which Megatron refuses it
        args.recompute_modules = [module for module in modules if module != "moe_act"]
        lines.append("moe_act of --recompute-modules")
    for name, flag, _ in _REFUSALS:
        value = getattr(args, name, None)
        if value:
            setattr(args, name, type(value)() if isinstance(value, bool | int) else None)
            lines.append(f"{flag} {'' if value is True else value}".rstrip())
    if getattr(args, "cuda_graph_impl", None) not in (None, "none") and hasattr(args, "inference_cuda_graph_scope"):
        args.inference_cuda_graph_scope = None  # Megatron's default for the implementation, which goes too
    for name, off, flag in _FOR_GPUS:
        if getattr(args, name, off) not in (None, off):
            setattr(args, name, off)
            lines.append(flag)
    if getattr(args, "transformer_impl", None) == "inference_optimized":
        args.transformer_impl, args.inference_fuse_tp_communication = "local", False
        lines.append("--transformer-impl inference_optimized")
    return lines


def _refuse(flag: str, instead: str) -> None:
    raise UserError(f"{flag} does not work on a CPU.\n  To run without a GPU, {instead}.\n  Or use --device cuda.")

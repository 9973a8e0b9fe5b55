"""Stands for Transformer Engine on a CPU: its linear layers, with its interface and its order of calls.

Read in its source, 2.3 to 2.18 and d0067d0d (2.20.0.dev0); the arithmetic is torch's. `install` puts the package where
Megatron looks for it, so that Megatron's own wrappers are made of these layers. It must come before Megatron's import:

    install(is_new=True)

What a backward leaves undefined is NaN here: the placeholder of a weight whose gradient is in main_grad, and the
buffers that a grouped layer hands out before they are filled.
"""

import functools
import queue
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

NAME = "transformer_engine"


class WeightGradStore:
    """First in, first out; the entries have no names."""

    def __init__(self, delay_wgrad_compute=False, ub_bulk_wgrad=False):
        assert not (delay_wgrad_compute and ub_bulk_wgrad)
        self.context = queue.Queue() if delay_wgrad_compute else None
        self.enabled = delay_wgrad_compute

    def delay_wgrad_compute(self):
        return self.enabled

    def put(self, tensor_list, func):
        assert self.enabled
        self.context.put([tensor_list, func])

    def pop(self):
        tensor_list, func = self.context.get_nowait()
        return func(*tensor_list), tensor_list


class Base(nn.Module):
    """What the linear layers have in common."""

    is_new = True  # from 2.16 on: the forward decides whether the backward has a store

    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
        parallel_mode=None, device="cuda", delay_wgrad_compute=False, ub_bulk_wgrad=False, ub_overlap_ag=False,
        ub_name=None, **_: Any,
    ):  # fmt: skip
        super().__init__()
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.fuse_wgrad_accumulation, self.use_bias, self.return_bias = fuse_wgrad_accumulation, bias, return_bias
        self.apply_bias = bias and not return_bias
        self.gemm_bias_unfused_add = self.apply_bias and parallel_mode == "row"
        self.ub_bulk_wgrad, self.ub_overlap_ag, self.ub_name = ub_bulk_wgrad, ub_overlap_ag, ub_name
        self.wgrad_store = WeightGradStore(delay_wgrad_compute, ub_bulk_wgrad)
        self.fp8 = False
        self._made = {"dtype": params_dtype or torch.float32, "device": device}
        self._init, self._tracker = init_method, get_rng_state_tracker

    def make_weight(self, name: str) -> None:
        weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **self._made))
        with self._tracker().fork() if self._tracker else nullcontext():
            self._init(weight)
        weight.tensor_model_parallel = self.parallel_mode is not None
        weight.partition_dim, weight.partition_stride = int(self.parallel_mode == "row"), 1
        self.register_parameter(name, weight)

    def make_bias(self, name: str) -> None:
        if not self.use_bias:
            setattr(self, name, torch.empty(0, **self._made))
            return
        bias = nn.Parameter(torch.zeros(self.out_features, **self._made))
        if self.parallel_mode == "column":
            bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
        else:
            bias.sequence_parallel = self.sequence_parallel
        self.register_parameter(name, bias)

    def store(self) -> WeightGradStore | None:
        return self.wgrad_store if not self.is_new or self.wgrad_store.delay_wgrad_compute() else None

    def need_backward_dw(self):
        return self.wgrad_store is not None and self.wgrad_store.delay_wgrad_compute()


class Linear(Base):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight_names, self.bias_names = ["weight"], ["bias"]
        self.make_weight("weight")
        self.make_bias("bias")

    def forward(self, inp, is_first_microbatch=None):
        in_product = self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None
        out = _Linear.apply(self.weight, inp, in_product, self, self.store(), is_first_microbatch)
        if self.gemm_bias_unfused_add:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out

    def backward_dw(self):
        if not self.need_backward_dw():
            return
        (wgrad, bgrad, *_), _ = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            self.weight.grad = wgrad
        if self.use_bias and self.bias.grad is None:
            self.bias.grad = bgrad


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", **kwargs: Any):
        super().__init__(in_features, out_features, **kwargs)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **self._made))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **self._made))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        if self.normalization == "LayerNorm":
            normed = F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            normed = F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, inp, bias, layer, store, is_first):
        ctx.save_for_backward(weight, inp, bias)
        ctx.layer, ctx.store, ctx.is_first = layer, store, is_first
        whole = inp
        if layer.parallel_mode == "column" and layer.sequence_parallel:
            whole, _ = gathered(inp, layer.tp_group)
        out = F.linear(whole, weight, bias)
        if layer.parallel_mode == "row" and layer.tp_size > 1:
            if layer.sequence_parallel:
                out, _ = scattered(out, layer.tp_group)
            else:
                dist.all_reduce(out, group=layer.tp_group)
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, inp, bias = ctx.saved_tensors
        layer, is_fused = ctx.layer, ctx.layer.fuse_wgrad_accumulation
        column, gather, work = layer.parallel_mode == "column" and layer.tp_size > 1, None, None
        if layer.parallel_mode == "row" and layer.sequence_parallel:
            grad, _ = gathered(grad, layer.tp_group)
        # In fp8 the bias's gradient is computed as the gradient of the output is cast.
        bgrad = rows(grad).sum(0) if bias is not None and layer.fp8 else None
        if column and layer.sequence_parallel:
            inp, gather = gathered(inp, layer.tp_group, wait=False)
        dgrad = grad @ weight
        if gather is not None:
            gather.wait()
        if column and layer.sequence_parallel:
            dgrad, work = scattered(dgrad, layer.tp_group, wait=False)
        elif column:
            work = dist.all_reduce(dgrad, group=layer.tp_group, async_op=True)
        product = functools.partial(
            gemm, out=weight.main_grad if is_fused else None, accumulate=is_fused and not ctx.is_first,
            bias=bias if bgrad is None else None,
        )  # fmt: skip
        wgrad = None
        if ctx.store is not None and ctx.store.delay_wgrad_compute():
            ctx.store.put([inp, grad], product)
        else:
            wgrad, bias_grad, *_ = product(inp, grad)
            bgrad = bias_grad if bgrad is None else bgrad
        if work is not None:
            work.wait()
        if is_fused and hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            wgrad = torch.full_like(weight, torch.nan)
        elif is_fused:
            wgrad = None
        return wgrad, dgrad, bgrad, None, None, None


class GroupedLinear(Base):
    """Several layers in one, each for its rows of the input."""

    def __init__(self, num_gemms, in_features, out_features, **kwargs: Any):
        super().__init__(in_features, out_features, **kwargs)
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            self.make_weight(f"weight{index}")
            self.make_bias(f"bias{index}")

    def forward(self, inp, m_splits, is_first_microbatch=None):
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        given = biases if self.apply_bias else [None] * self.num_gemms
        out = _Grouped.apply(inp, list(m_splits), self, self.store(), is_first_microbatch, *weights, *given)
        return (out, biases) if self.return_bias else out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, splits, layer, store, is_first, *parameters):
        ctx.save_for_backward(inp, *parameters)
        ctx.splits, ctx.layer, ctx.store, ctx.is_first = splits, layer, store, is_first
        weights, biases = parameters[: layer.num_gemms], parameters[layer.num_gemms :]
        parts = zip(rows(inp).split(splits), weights, biases, strict=True)
        return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts]).view(*inp.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        inp, *parameters = ctx.saved_tensors
        layer, is_fused = ctx.layer, ctx.layer.fuse_wgrad_accumulation
        weights, biases = parameters[: layer.num_gemms], parameters[layer.num_gemms :]
        parts, grads = rows(inp).split(ctx.splits), rows(grad).split(ctx.splits)
        dgrad = torch.cat([part @ weight for part, weight in zip(grads, weights, strict=True)])
        buffers = [weight.main_grad if is_fused else torch.full_like(weight, torch.nan) for weight in weights]
        product = functools.partial(grouped_gemm, accumulate=is_fused and not ctx.is_first, biases=biases)
        bgrads = [None] * layer.num_gemms
        if ctx.store is not None and ctx.store.delay_wgrad_compute():
            ctx.store.put([parts, grads, buffers], product)
        else:
            _, bgrads, _ = product(parts, grads, buffers)
        if is_fused:
            for weight in weights:
                weight.grad_added_to_main_grad = True
            buffers = [torch.full_like(weight, torch.nan) for weight in weights]
        return dgrad.view(inp.shape), None, None, None, None, *buffers, *bgrads


def gemm(inputs, grad, out, accumulate, bias):
    """Return the gradients of weight and bias, and two more values, as general_gemm does."""
    wgrad = rows(grad).t() @ rows(inputs)
    if out is not None:
        wgrad = out.add_(wgrad) if accumulate else out.copy_(wgrad)
    return wgrad, None if bias is None else rows(grad).sum(0), None, None


def grouped_gemm(inputs, grads, out, accumulate, biases):
    for each, grad, buffer in zip(inputs, grads, out, strict=True):
        wgrad = grad.t() @ each
        buffer.add_(wgrad) if accumulate else buffer.copy_(wgrad)
    return out, [None if bias is None else grad.sum(0) for bias, grad in zip(biases, grads, strict=True)], None


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1, tensor.shape[-1])


def gathered(part, group, wait=True):
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=not wait)


def scattered(whole, group, wait=True):
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    return part, dist.reduce_scatter_tensor(part, whole.contiguous(), group=group, async_op=not wait)


class DotProductAttention(nn.Module):
    """Causal attention on [sequence, micro-batch, heads, width]."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, query, key, value, mask, **_: Any):
        repeat = query.shape[2] // key.shape[2]
        key, value = (each.repeat_interleave(repeat, 2) for each in (key, value))
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return found.permute(2, 0, 1, 3).flatten(2)


class LayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape, eps, sequence_parallel=False, **_: Any):
        super().__init__(normalized_shape, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel


class RMSNorm(nn.RMSNorm):
    def __init__(self, normalized_shape, eps, sequence_parallel=False, **_: Any):
        super().__init__(normalized_shape, eps)
        self.weight.sequence_parallel = sequence_parallel


class FP8GlobalStateManager:
    is_fp8_enabled = staticmethod(lambda: False)


def install(is_new: bool) -> None:
    """Make the package importable, with what Megatron imports of it without asking whether it is there.

    is_new: the layers ask their stores as since 2.16. Megatron sees 2.6, of which it takes the fewest kernels.
    """
    assert "megatron.core" not in sys.modules, "Megatron has looked for Transformer Engine already"
    Base.is_new = is_new
    apex = ModuleType("fused_weight_gradient_mlp_cuda")  # which the output layer uses, Megatron's own
    apex.wgrad_gemm_accum_fp32 = lambda inputs, grad, main_grad: main_grad.add_(grad.t() @ inputs)
    sys.modules[apex.__name__] = apex
    anything = type("Anything", (), {})
    layers = (Linear, LayerNormLinear, GroupedLinear, DotProductAttention, LayerNorm, RMSNorm)
    contents = {
        "": {"__version__": "2.6.0"},
        ".common": {}, ".common.recipe": {"DelayedScaling": anything},
        ".pytorch": {layer.__name__: layer for layer in layers},
        ".pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": nullcontext, "fp8_model_init": nullcontext,
        },
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": anything, "checkpoint": None, "activation_recompute_forward": nullcontext,
        },
        ".pytorch.ops": {"Sequential": anything, "FusibleOperation": anything},
        ".pytorch.tensor": {"QuantizedTensor": anything},
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(NAME + name)
        vars(module).update(values, __path__=[])
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)

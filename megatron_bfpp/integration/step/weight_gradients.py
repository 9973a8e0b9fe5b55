"""Splits the backward of Megatron's linear layers: the input's gradient at once, the weight's when its W runs.

Megatron's layers of the local implementation share one autograd function. While an I runs, its backward computes the
input's gradient and that of the bias, and owes the weight's. All other parameters (norms, biases, embeddings, routers)
get their gradients within the I, from autograd.

With sequence parallelism the input is kept as it is, one part per tensor-parallel rank, and gathered again by the W:
to keep the gathered one would take t times the bytes. Megatron gathers it once too, in its backward.

Megatron hides the reduction of the input's gradient over the tensor-parallel ranks under the gradient of the same
layer's weight. Here an older weight's gradient takes that place, where the plan has a W behind the I.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe.router import Router
from torch.nn import Embedding, Module, Parameter

from ...runtime.weight_gradients import OwedGradients, placeholder
from ..seams import changed
from . import transformer_engine

_LINEAR = (layers.ColumnParallelLinear, layers.RowParallelLinear)
_NOT_LINEAR = (layers.VocabParallelEmbedding, Embedding, Router)  # their matrices are no linear layer's


class _LinearGradient:
    """The gradient of a linear layer's weight for one use of it: output gradient times input.

    inputs: [sequence (/ tp with sequence parallelism), micro-batch, in], or tokens by in. grad: tokens by out.
    """

    def __init__(self, ctx: Any, inputs: torch.Tensor, grad: torch.Tensor):
        self._inputs, self._grad = inputs, grad
        self._group = ctx.tp_group if ctx.sequence_parallel else None
        self._main_grad = ctx.main_grad if ctx.gradient_accumulation_fusion else None
        self._gather: dist.Work | None = None

    def prepare(self) -> None:
        """Launch the gather of an input that the tensor-parallel ranks hold in parts."""
        if self._group is not None:
            part = self._inputs
            self._inputs = part.new_empty(part.shape[0] * self._group.size(), *part.shape[1:])
            self._gather = dist.all_gather_into_tensor(self._inputs, part, group=self._group, async_op=True)

    def compute(self) -> torch.Tensor | None:
        """Return the gradient, or None where Apex's kernel has added it to main_grad."""
        if self._gather is not None:
            self._gather.wait()
        inputs = _by_tokens(self._inputs)
        if self._main_grad is None:
            return self._grad.t().matmul(inputs)
        is_single = self._main_grad.dtype == torch.float32
        kernels = layers.fused_weight_gradient_mlp_cuda
        kernel = kernels.wgrad_gemm_accum_fp32 if is_single else kernels.wgrad_gemm_accum_fp16
        kernel(inputs, self._grad, self._main_grad)
        return None


@contextmanager
def deferred(model: list[Module], owed: OwedGradients | None) -> Iterator[None]:
    """Let the linear layers of the chunks owe the gradients of their weights for a while. None: leave all as it is."""
    if owed is None:
        yield
        return
    weights = cache(lambda chunk: _splittable_ids(model[chunk]))
    function = layers.LinearWithGradAccumulationAndAsyncCommunication
    original = function.backward

    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A buffer: --defer-embedding-wgrad-compute, by which Megatron itself defers the gradient of the output layer.
        is_plain = ctx.grad_output_buffer is None and getattr(ctx, "gtp_remat_size", 1) == 1
        if not owed.is_deferring or not is_plain:
            return original(ctx, grad_output)  # type: ignore[no-any-return]
        return _backward(ctx, grad_output, owed, weights(owed.chunk))

    engine = transformer_engine.deferred(model, owed, _splittable_ids)
    with changed(function, backward=staticmethod(layers.custom_bwd(backward))), engine:
        yield


def _backward(
    ctx: Any, grad_output: torch.Tensor, owed: OwedGradients, weights: frozenset[int]
) -> tuple[torch.Tensor | None, ...]:
    """Return what the function's own backward does, with a placeholder for a gradient that is owed."""
    inputs, weight = ctx.saved_tensors
    grad_output = grad_output.to(inputs.dtype)  # Megatron after 0.19 has layers with outputs of another type
    if ctx.gradient_accumulation_fusion:
        weight.main_grad = ctx.main_grad
    input_grad, reduction = _reduced(ctx, grad_output.matmul(weight), inputs)
    grad = _by_tokens(grad_output)
    # Detached: through its graph a saved input would keep a checkpointed layer's input, and its gradient, until the W.
    gradient = _LinearGradient(ctx, inputs.detach(), grad)
    if id(weight) in weights:
        owed.owe(weight, gradient)
        weight_grad = None
        if reduction is not None:
            owed.cover_communication()
    else:
        gradient.prepare()
        weight_grad = gradient.compute()
    bias_grad = grad.sum(dim=0) if ctx.use_bias else None
    if weight_grad is None:
        weight_grad = placeholder(weight)
    if reduction is not None:
        reduction.wait()
    return input_grad, weight_grad, bias_grad, *(None,) * (len(ctx.needs_input_grad) - 3)


def _reduced(ctx: Any, input_grad: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, dist.Work | None]:
    """Launch the sum of an input's gradient over the tensor-parallel ranks; return where it will be."""
    if ctx.allreduce_dgrad:
        return input_grad, dist.all_reduce(input_grad, group=ctx.tp_group, async_op=True)
    if ctx.sequence_parallel:
        part = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        return part, dist.reduce_scatter_tensor(part, input_grad.contiguous(), group=ctx.tp_group, async_op=True)
    return input_grad, None


def _by_tokens(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1, tensor.shape[-1])


def splittable(chunk: Module) -> tuple[list[Parameter], list[str]]:
    """Return the weights of a chunk whose gradients an I can owe, and the names of the layers that it computes whole.

    A weight that other modules use too stays whole: an embedding's gradient is summed with that of the output layer
    by autograd, in one backward.
    """
    modules = dict(chunk.named_modules())
    unused = [f"{name}." for name, module in modules.items() if transformer_engine.is_unused(module)]
    own = {name: [] if name.startswith(tuple(unused)) else _own(module) for name, module in modules.items()}
    owners = Counter(
        id(parameter)
        for name, module in modules.items()
        for parameter in module.parameters(recurse=False)
        if all(parameter is not weight for weight in own[name])
    )
    weights, whole = [], []
    for name, module in modules.items():
        if own[name] and all(id(weight) not in owners for weight in own[name]):
            weights += [weight for weight in own[name] if weight.requires_grad]
        elif isinstance(module, _LINEAR):
            whole.append(name)
        elif not isinstance(module, _NOT_LINEAR):
            matrices = (each.requires_grad and each.dim() > 1 for each in module.parameters(recurse=False))
            whole += [name] if any(matrices) else []
    return weights, whole


def owed_bytes(chunk: Module, config: Any, tokens: int) -> int:
    """Return what a chunk keeps for the W of one micro-batch: the inputs of its linear layers and their gradients.

    tokens: of a micro-batch on a rank, before sequence parallelism cuts it. Of experts each gets the same share. Under
    fp8 Transformer Engine's layers keep less.
    """
    ids = _splittable_ids(chunk)
    size = 0
    for name, module in chunk.named_modules():
        # Grouped layers, and the others that are an expert's.
        is_expert = getattr(module, "is_expert", hasattr(module, "num_gemms") or ".local_experts." in name)
        count = tokens
        if is_expert:
            count = tokens * config.moe_router_topk * config.expert_model_parallel_size // config.num_moe_experts
        parts = module.tp_group.size() if _gathers_again(module) else 1
        for weight in _own(module):
            if id(weight) in ids:
                outputs, inputs = weight.shape[-2:]
                matrices = weight.numel() // (outputs * inputs)
                size += matrices * (count // parts * inputs + count * outputs) * weight.element_size()
    return size


def _gathers_again(module: Module) -> bool:
    """Return whether a layer keeps a part of its input over the sequence, which its W gathers."""
    return isinstance(module, layers.ColumnParallelLinear) and bool(module.sequence_parallel)


def _splittable_ids(chunk: Module) -> frozenset[int]:
    return frozenset(map(id, splittable(chunk)[0]))


def _own(module: Module) -> list[Parameter]:
    """Return the weights of a linear layer whose gradients may wait, as far as can be told from the layer alone."""
    if isinstance(module, _LINEAR):
        return [] if module.weight is None else [module.weight]
    return transformer_engine.weights(module)

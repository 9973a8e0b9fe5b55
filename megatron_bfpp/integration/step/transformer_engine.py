"""Splits the backward of Transformer Engine's linear layers, through the store that each of them has for that.

Since 2.3 a layer has a `wgrad_store`. Where it delays, the layer's backward gives it the matrix product of the weight's
gradient, with its tensors, in place of running it. For the time of a step each layer has a store of ours, which owes
what it is given. A layer's own store would not do. It is a queue without names of micro-batches. A layer has one only
if it is built with `delay_wgrad_compute`, which TransformerConfig allows for the combined 1F1B alone. And its
`backward_dw` gives a bias a .grad only where there is none: of two owed micro-batches the second is lost.

With sequence parallelism a layer gives the gathered input, and an owed gradient keeps it.

Read in Transformer Engine 2.3 to 2.18 and d0067d0d (2.20.0.dev0).
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import Module, Parameter

from ...runtime.weight_gradients import OwedGradients, placeholder
from ..seams import put


class _Product:
    """The matrix product of one use of a layer: it computes the gradients of weights and bias together."""

    def __init__(self, tensors: list[Any], function: Callable[..., Any]):
        self._call: tuple[list[Any], Callable[..., Any]] | None = (tensors, function)
        self._results: list[Any] = []

    def take(self, index: int) -> Any:
        """Return one result, the weight's (0) or the bias's (1), and forget it."""
        if self._call is not None:
            tensors, function = self._call
            self._call = None  # frees the tensors
            self._results = list(function(*tensors)[:2])
        result, self._results[index] = self._results[index], None
        return result


class _EngineGradient:
    """The gradient of one parameter by a `_Product`. is_fused: the product adds it to main_grad by itself."""

    def __init__(self, product: _Product, index: int, parameter: Parameter, is_fused: bool):
        self._product, self._index, self._dtype, self._is_fused = product, index, parameter.dtype, is_fused

    def prepare(self) -> None:
        """Do nothing: the layer has gathered its tensors."""

    def compute(self) -> torch.Tensor | None:
        """Return the gradient. None where the product has added it, and for a bias whose gradient came with the I."""
        result = self._product.take(self._index)
        return None if self._is_fused or result is None else result.to(self._dtype)


class _Store:
    """Stands for a layer's WeightGradStore during one step."""

    def __init__(self, layer: Any, owed: OwedGradients):
        self._layer, self._owed, self._names = layer, owed, _names(layer)
        self.is_asked = self.is_used = False

    def delay_wgrad_compute(self) -> bool:
        """Return True. Newer layers ask in the forward, older ones in the backward, which is an I."""
        self.is_asked = True
        return True

    def put(self, tensors: list[Any], function: Callable[..., Any]) -> None:
        """Owe what `function` computes of `tensors`: called in the layer's backward in place of the product."""
        layer, product = self._layer, _Product(tensors, function)
        self.is_used, is_fused = True, layer.fuse_wgrad_accumulation
        for weight in map(layer._parameters.__getitem__, self._names):
            if not is_fused and (stand_in := placeholder(weight)) is not None:
                weight.grad = stand_in
            self._owed.owe(weight, _EngineGradient(product, 0, weight, is_fused))
        bias = _bias(layer)
        if bias is not None and bias.requires_grad:
            if hasattr(bias, "grad_added_to_main_grad"):
                # Megatron's hook demands a gradient under --overlap-grad-reduce, and adds this one. In fp8 the bias's
                # comes from the I: autograd adds it to this tensor.
                bias.grad = torch.zeros_like(bias)
            self._owed.owe(bias, _EngineGradient(product, 1, bias, False))
        if layer.parallel_mode == "column" and layer.tp_size > 1:
            self._owed.cover_communication()  # the reduction of the input's gradient is under way


@contextmanager
def deferred(
    model: list[Module], owed: OwedGradients, splittable: Callable[[Module], Collection[int]]
) -> Iterator[None]:
    """Let the layers of the chunks owe the gradients of their weights for a while.

    splittable: gives the ids of a chunk's weights whose gradients may wait.
    """
    stores = []
    with ExitStack() as stack:
        for chunk in model:
            layers = [module for module in chunk.modules() if weights(module)]
            ids = splittable(chunk) if layers else ()
            for layer in layers:
                if all(id(weight) in ids for weight in weights(layer)):
                    stores.append(_Store(layer, owed))
                    put(stack, layer, "wgrad_store", stores[-1])
        yield
    if any(store.is_asked for store in stores) and not any(store.is_used for store in stores):
        warnings.warn(
            f"megatron_bfpp: none of {len(stores)} layers of Transformer Engine has left its weights' gradients to the "
            "W's: this release of it is not known. They were computed with the inputs', and the step gained nothing.",
            stacklevel=2,
        )


def weights(layer: Module) -> list[Parameter]:
    """Return the weights whose gradients a layer of Transformer Engine can owe; none of any other module."""
    found = [layer._parameters[name] for name in _names(layer)]
    return [each for each in found if each is not None] if all(map(_is_plain, found)) else []


def is_unused(module: Module) -> bool:
    """Return whether the layers in a module lend their weights to fused operations, which compute in their place."""
    return hasattr(module, "_fused_impl") or bool(getattr(module, "_with_fused_impl", False))


def _names(layer: Any) -> list[str]:
    """Return the names of the weights that a layer can owe.

    None of a layer with Userbuffers, which are written again before its W; of one that delays by its own store already;
    and of a grouped layer with biases or without gradient accumulation fusion, whose backward hands out buffers that
    are still empty.
    """
    engine = sys.modules.get("transformer_engine.pytorch")
    store = getattr(layer, "wgrad_store", None)
    if engine is None or store is None or (not isinstance(store, _Store) and store.delay_wgrad_compute()):
        return []
    if any(value is True for name, value in vars(layer).items() if name.startswith("ub_")):
        return []
    if isinstance(layer, engine.Linear | engine.LayerNormLinear):
        return list(layer.weight_names) if len(layer.weight_names) == 1 else []
    if isinstance(layer, engine.GroupedLinear) and layer.fuse_wgrad_accumulation and not layer.use_bias:
        names = ("weight", *(f"weight{index}" for index in range(layer.num_gemms)))
        return [name for name in names if layer._parameters.get(name) is not None]
    return []


def _is_plain(weight: Parameter | None) -> bool:
    """Return whether a gradient may wait. Megatron's distributed weights reduce theirs within the backward."""
    return weight is not None and weight.requires_grad and not getattr(weight, "is_distributed_weight", False)


def _bias(layer: Any) -> Parameter | None:
    """Return the bias whose gradient the product computes, except in fp8: one that the forward's product adds."""
    is_in_product = getattr(layer, "apply_bias", False) and not layer.gemm_bias_unfused_add
    return layer._parameters.get(layer.bias_names[0]) if is_in_product else None

"""What Megatron builds of Transformer Engine's modules only, built without it: gated delta nets of a GPT, and the
projections of experts at a latent width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..integration.seams import changed

__all__ = ["VARIANT", "local_layers"]

VARIANT = "gated_delta_net"


@contextmanager
def local_layers(args: Any) -> Iterator[None]:
    """Let Megatron build such layers, with the same parameters; nothing for another job."""
    from megatron.core.transformer.moe import moe_layer

    latent = {"HAVE_TE": True, "TELinear": _whole} if getattr(args, "moe_latent_size", None) else {}
    with changed(moe_layer, **latent), _gated_delta_nets(args):
        yield


def _whole(inputs: int, outputs: int, *, bias: bool, **_: Any) -> torch.nn.Linear:
    """Return a linear layer that every tensor-parallel rank has whole."""
    return torch.nn.Linear(inputs, outputs, bias)


@contextmanager
def _gated_delta_nets(args: Any) -> Iterator[None]:
    if getattr(args, "experimental_attention_variant", None) != VARIANT:
        yield
        return
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

    local = {"_get_backend_spec_provider": lambda config: LocalSpecProvider()}
    with changed(specs, get_transformer_layer_with_experimental_attention_variant_spec=_layers, **local):
        yield


def _layers(config: Any, backend: Any = None) -> list[Any]:
    """Return the spec of each layer of the model, as the function of Megatron that it stands for."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from ..integration.cpu.hybrid import LAYERS

    def layer(has_experts: int) -> Any:
        return get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if has_experts else None, qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention, normalization=config.normalization,
        )  # fmt: skip

    delta = LAYERS.submodules.gdn_layer.submodules.self_attention
    linear = specs.get_linear_attention_pattern(config=config)
    experts = [0] * config.num_layers if config.num_moe_experts is None else specs.get_moe_layer_pattern(config=config)
    found = []
    for is_linear, has_experts in zip(linear, experts, strict=True):
        spec = layer(has_experts)
        if is_linear:
            spec = replace(spec, submodules=replace(spec.submodules, self_attention=delta))
        found.append(spec)
    return found

"""The layers of Megatron's hybrid models on a CPU: its own spec of them names Transformer Engine's modules only.

LAYERS is that spec with Megatron's local modules instead, as `--transformer-impl local` has them for a GPT, under the
same names in a checkpoint. Mamba and Gated Delta Net layers are Megatron's too, with their CUDA kernels in torch.
"""

import copy
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec  # its name in every release
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from ...console.errors import UserError
from ..seams import put

__all__ = ["LAYERS", "TorchGatedDeltaNet", "TorchMambaMixer", "mamba_scan"]


class _GroupedRMSNorm(torch.nn.Module):
    """mamba_ssm's RMSNormGated without a gate: each group of `group_size` channels has a norm of its own."""

    tp_group: Any = None

    def __init__(self, width: int, eps: float, group_size: int, device: Any, dtype: Any, **_: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [..., width] in fp32."""
        groups = torch.unflatten(x.float(), -1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        scaled: torch.Tensor = normed.flatten(-2) * self.weight.float()
        return scaled.to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Return the weight, which tensor-parallel ranks share out, as Megatron's own norm of this layer does."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def mamba_scan(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    *,
    headdim: int | None,
    ngroups: int,
    seq_idx: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Compute what mamba_ssm's mamba_split_conv1d_scan_combined does, in time and memory of the square of the sequence.

    Mamba-2 as attention with a decay (Dao and Gu, arXiv 2405.21060, section 3):
    y_t = sum over s <= t of (C_t . B_s) exp(sum of dt A over s < r <= t) dt_s x_s, plus D x_t, gated by silu(z_t).

    Args:
        zxbcdt: [micro-batch, sequence, 2 inner + 2 ngroups state + heads], inner = heads * headdim
        conv_weight, conv_bias: [inner + 2 ngroups state, taps] and [inner + 2 ngroups state]
        dt_bias, A: [heads]
        D: [heads], or [heads, headdim] with headdim None
    """
    if seq_idx is not None:
        raise UserError("packed sequences with Mamba layers do not work on a CPU.\n  Leave out --sft, or use a GPU.")
    length, heads = zxbcdt.size(1), dt_bias.numel()
    width = D.size(1) if headdim is None else headdim
    inner, channels = heads * width, conv_weight.size(0)
    z, xbc, dt = torch.split(zxbcdt, [inner, channels, heads], dim=-1)
    taps = conv_weight.size(1)
    convolved = torch.nn.functional.conv1d(
        xbc.transpose(1, 2), conv_weight[:, None], conv_bias, padding=taps - 1, groups=channels
    )[..., :length]  # causal: position t sees t - taps + 1 to t
    inputs = torch.nn.functional.silu(convolved).transpose(1, 2).float()
    x, b, c = torch.split(inputs, [inner, (channels - inner) // 2, (channels - inner) // 2], dim=-1)
    x = torch.unflatten(x, -1, (heads, width))
    dt = torch.nn.functional.softplus(dt.float() + dt_bias)
    decay = (dt * A).cumsum(1).transpose(1, 2)  # [micro-batch, heads, sequence]
    scores = torch.einsum("btgn,bsgn->bgts", *(torch.unflatten(each, -1, (ngroups, -1)) for each in (c, b)))
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    since = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, float("-inf"))
    weights = scores.repeat_interleave(heads // ngroups, dim=1) * since.exp()
    y = torch.einsum("bhts,bshp->bthp", weights, x * dt[..., None]) + x * D.reshape(heads, -1)
    gated: torch.Tensor = y.flatten(-2).to(zxbcdt.dtype) * torch.nn.functional.silu(z)
    return gated


class TorchMambaMixer(MambaMixer):  # type: ignore[misc]
    """Megatron's Mamba-2 mixer, with torch in place of mamba_ssm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _replaced(mamba_mixer, HAVE_MAMBA_SSM=True, RMSNormGated=_GroupedRMSNorm, ExtendedRMSNorm=_GroupedRMSNorm):
            super().__init__(*args, **kwargs)
        if self.rmsnorm:
            self.norm.tp_group = self.pg_collection.tp

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run Megatron's forward."""
        with _replaced(mamba_mixer, mamba_split_conv1d_scan_combined=mamba_scan):
            return super().forward(*args, **kwargs)


# Where the layer finds its kernels: a module of its own up to 0.18, that of its base class since.
_GDN_MODULES = [sys.modules[each.__module__] for each in GatedDeltaNet.__mro__ if "gated_delta" in each.__module__]


def _l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    normed: torch.Tensor = (x.float() * torch.rsqrt(x.float().square().sum(dim, keepdim=True) + eps)).to(x.dtype)
    return normed


class TorchGatedDeltaNet(GatedDeltaNet):  # type: ignore[misc]
    """Megatron's Gated Delta Net as in its deterministic mode, which is written in torch, for want of FLA's kernels."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        deterministic = copy.copy(config)
        deterministic.deterministic_mode = True
        with _replaced(*_GDN_MODULES, HAVE_FLA=True):
            super().__init__(deterministic, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run Megatron's forward."""
        with _replaced(*_GDN_MODULES, l2norm=_l2norm):
            return super().forward(*args, **kwargs)


def _replaced(*modules: Any, **names: Any) -> ExitStack:
    """Return a context in which names of Megatron's modules are others."""
    stack = ExitStack()
    for module in modules:
        for name, value in names.items():
            put(stack, module, name, value)
    return stack


def _layers() -> ModuleSpec:
    """Return Megatron's spec of a hybrid stack with local modules."""
    stack, local = mamba_stack_spec, get_gpt_layer_local_spec().submodules
    theirs = stack.submodules
    bda, norm = get_bias_dropout_add, WrappedTorchNorm
    attention = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=local.self_attention,
        self_attn_bda=bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=local.mlp,
        mlp_bda=bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm, mlp=get_moe_module_spec(use_te=False, num_experts=8), mlp_bda=bda
    )  # as in Megatron's spec, the number of experts only says that there are some
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=norm,
        mixer=ModuleSpec(module=TorchMambaMixer, submodules=mixer),
        mamba_bda=bda,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    gdn = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=norm, out_proj=RowParallelLinear)
    delta = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(module=TorchGatedDeltaNet, submodules=gdn),
        self_attn_bda=bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    replaced = {
        "attention_layer": attention, "mlp_layer": mlp, "moe_layer": experts, "mamba_layer": mamba, "gdn_layer": delta
    }  # fmt: skip
    specs = {name: replace(getattr(theirs, name), submodules=layer) for name, layer in replaced.items()}
    return replace(stack, submodules=replace(theirs, mtp_block_spec=_mtp_block(theirs.mtp_block_spec), **specs))


def _mtp_block(spec: ModuleSpec) -> ModuleSpec:
    """Return Megatron's block of multi-token prediction with local modules; its layers are those of the pattern."""
    norm = WrappedTorchNorm
    (layer,) = spec.submodules.layer_specs
    local = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=norm
    )
    return replace(spec, submodules=replace(spec.submodules, layer_specs=[replace(layer, submodules=local)]))


LAYERS = _layers()

"""A hybrid model's layers on a CPU: the kernels written in torch, and which spec the CPU mode names."""

import argparse

import pytest
import torch

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.cpu.arguments import cpu_arguments

THEIRS = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
OURS = ["megatron_bfpp.integration.cpu.hybrid", "LAYERS"]


def recurrence(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, headdim, ngroups):
    """Mamba-2 as it is defined: one position after the other, a state per head."""
    heads, channels, taps = dt_bias.numel(), *conv_weight.shape
    inner, state = heads * headdim, (channels - heads * headdim) // (2 * ngroups)
    rows = []
    for sample in zxbcdt:
        held = torch.zeros(heads, headdim, state)
        for t in range(len(sample)):
            z, _, dt = sample[t].split([inner, channels, heads])
            seen = [sample[t - back, inner : inner + channels] for back in range(taps) if back <= t]
            mixed = sum((conv_weight[:, taps - 1 - back] * each for back, each in enumerate(seen)), conv_bias)
            x, b, c = torch.nn.functional.silu(mixed).split([inner, ngroups * state, ngroups * state])
            x, dt = x.view(heads, headdim), torch.nn.functional.softplus(dt + dt_bias)
            b, c = (each.view(ngroups, state).repeat_interleave(heads // ngroups, 0) for each in (b, c))
            held = held * (dt * A).exp()[:, None, None] + (dt[:, None] * x)[:, :, None] * b[:, None]
            y = (held * c[:, None]).sum(-1) + D[:, None] * x
            rows.append(y.flatten() * torch.nn.functional.silu(z))
    return torch.stack(rows).view(len(zxbcdt), -1, inner)


def test_the_scan_of_mamba_is_its_recurrence():
    from megatron_bfpp.integration.cpu.hybrid import mamba_scan

    torch.manual_seed(0)
    heads, headdim, ngroups, state, taps = 4, 3, 2, 5, 4
    inner, channels = heads * headdim, heads * headdim + 2 * ngroups * state
    parameters = [torch.randn(channels, taps), torch.randn(channels), torch.randn(heads), -torch.rand(heads)]
    given = [torch.randn(2, 9, inner + channels + heads), *parameters, torch.randn(heads)]
    shape = {"headdim": headdim, "ngroups": ngroups}
    torch.testing.assert_close(mamba_scan(*given, **shape), recurrence(*given, **shape))


def test_packed_sequences_are_refused():
    from megatron_bfpp.integration.cpu.hybrid import mamba_scan

    with pytest.raises(UserError, match="packed sequences"):
        mamba_scan(*[torch.ones(1)] * 6, headdim=1, ngroups=1, seq_idx=torch.zeros(1))


@pytest.mark.parametrize("given", [None, THEIRS, ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]])
def test_megatrons_specs_are_replaced_and_the_line_says_so(given):
    args = argparse.Namespace(hybrid_layer_pattern="M*|-E|G/*-", spec=given)
    (line,) = cpu_arguments(args)
    assert args.spec == OURS and " ".join(OURS) in line


def test_a_spec_of_the_users_own_stays_and_so_does_a_gpts():
    args = argparse.Namespace(hybrid_layer_pattern="D-", spec=["mine", "layers"])
    assert cpu_arguments(args) == [] and args.spec == ["mine", "layers"]
    args = argparse.Namespace(hybrid_layer_pattern=None, spec=None)
    assert cpu_arguments(args) == [] and args.spec is None


@pytest.mark.parametrize("layer", ["D", "+"])
def test_layers_without_a_cpu_version_are_refused(layer):
    with pytest.raises(UserError, match=r"layer .* of --hybrid-layer-pattern .* does not work on a CPU") as refusal:
        cpu_arguments(argparse.Namespace(hybrid_layer_pattern=f"{layer}-|-", spec=None))
    assert len(str(refusal.value).splitlines()) <= 3

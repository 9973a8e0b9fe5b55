"""Stand-ins for fused kernels that a CPU does not have: torch computes, and what the kernel saves is saved.

What they save is read from the code of mamba_ssm's MambaSplitConv1dScanCombinedFn and its norm, which make the
convolution again, and of fla's chunk_gated_delta_rule, which keeps [64, 64] blocks along a sequence. Of fla's
convolution and l2norm and of Transformer Engine's linear layer it is assumed: their input. The code around them is
Megatron's own.
"""

import torch

CHUNK = 64  # positions of a chunk of fla's rule


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, output, *kept):
        ctx.save_for_backward(*kept)
        return output.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("the stand-in of a kernel has no backward")


def _kernel(compute, anchor, *kept):
    with torch.no_grad():
        output = compute()
    return _Kernel.apply(anchor, output, *kept)


class _Linear(torch.nn.Linear):
    def __init__(self, inputs, outputs, *, bias, name=None, config=None, **_):
        super().__init__(inputs, outputs, bias=bias, dtype=config.params_dtype)

    def forward(self, x):
        return super().forward(x), None


def stand_in() -> None:
    """Put them in place of the CPU mode's layers, in a process that measures and does not train."""
    from megatron.core.transformer.moe import moe_layer

    from megatron_bfpp.integration.cpu import hybrid

    moe_layer.HAVE_TE, moe_layer.TELinear = True, _Linear
    scan, norm, l2norm = hybrid.mamba_scan, hybrid._GroupedRMSNorm.forward, hybrid._l2norm

    def scanned(zxbcdt, *args, **kwargs):
        with torch.no_grad():
            y = scan(zxbcdt, *args, **kwargs)
        return _Kernel.apply(zxbcdt, y, zxbcdt, torch.empty_like(y))

    hybrid.mamba_scan = scanned
    hybrid._GroupedRMSNorm.forward = lambda self, x: _kernel(lambda: norm(self, x), x, x)
    hybrid._l2norm = lambda x, *args: _kernel(lambda: l2norm(x, *args), x, x)
    _delta(hybrid.TorchGatedDeltaNet, hybrid._GDN_MODULES)


def _delta(layer, modules) -> None:
    init, gated = layer.__init__, layer._apply_gated_norm

    def convolved(x, **_):
        return _kernel(lambda: x.contiguous(), x, x), None

    def rule(query, key, value, g, beta, **_):
        blocks = torch.empty(*g.shape, CHUNK, dtype=key.dtype)
        return _kernel(lambda: value, value, query, key, value, g, beta, blocks), None

    def build(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.config.deterministic_mode, self.gated_delta_rule = False, rule

    layer.__init__ = build
    layer._apply_gated_norm = lambda self, x, gate: _kernel(lambda: gated(self, x, gate), x, x, gate)
    layer._compute_g_and_beta = lambda self, log, bias, alpha, beta: (alpha.float(), beta.sigmoid())
    for module in modules:
        if hasattr(module, "causal_conv1d"):
            module.causal_conv1d = convolved

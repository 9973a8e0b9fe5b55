"""Adam for CPU tensors that keeps its state as Megatron expects it from Transformer Engine and Apex.

Megatron falls back to torch.optim.AdamW where neither is installed. That class keeps a `step` tensor per parameter, and
DistributedOptimizer (0.17.1 to 0.19.2) cannot resume it: `state_dict` asserts on the empty state of a job that has
just started, `load_state_dict` gives all parameters one shared step tensor, so that each step counts once per
parameter, and `_set_main_param_and_optimizer_states` looks for a `step` that checkpoints do not hold per parameter.
FusedAdam keeps `step` in the parameter group and meets none of the three; so does this class. Also, the code paths and
the layout of checkpoints are those of GPUs, and an installed Transformer Engine, whose kernels refuse CPU tensors, is
not used.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["CpuAdam", "optimizer_patches"]


class CpuAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) or, with `adam_w_mode`, AdamW (arXiv:1711.05101).

    The constructor takes the arguments that Megatron passes to Apex's FusedAdam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("CpuAdam cannot be captured in a CUDA graph")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update once. A group counts its step even when it is empty on this rank, so that all ranks save the same."""
        assert closure is None, "Megatron passes no closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        grad = param.grad
        assert grad is not None, "step passes parameters with gradients"
        if self.adam_w_mode:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"] != 0:
            grad = grad.add(param, alpha=group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        bias_correction1 = 1 - beta1 ** group["step"]
        bias_correction2 = 1 - beta2 ** group["step"]
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(bias_correction2)).add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / bias_correction1)


def optimizer_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of every name that makes Megatron's optimizers work on CPU tensors."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    yield optimizer, "Adam", CpuAdam
    yield optimizer, "SGD", torch.optim.SGD  # a FusedSGD takes CUDA tensors only
    yield optimizer, "USING_PYTORCH_OPTIMIZER", False  # Adam is ours, with FusedAdam's arguments
    yield distrib_optimizer, "HAVE_APEX_OR_TE", True  # our state has FusedAdam's layout
    yield distrib_optimizer, "Adam", CpuAdam  # 0.17 and 0.18 assert that the optimizer is this class
    # Loading dp_reshardable, the default, copies into views of leaves when parameters are fp32, without no_grad.
    distributed, name = distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states"
    yield distributed, name, torch.no_grad()(getattr(distributed, name))
    # The kernels of Transformer Engine and of Apex take CUDA tensors only; Megatron has its own equivalents.
    yield base, "multi_tensor_applier", utils.local_multi_tensor_applier
    yield base, "multi_tensor_scale_impl", utils.local_multi_tensor_scale
    yield clip_grads, "multi_tensor_applier", utils.local_multi_tensor_applier
    yield clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm
    yield clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale

"""What Megatron says of a hybrid model's pattern of layers. How the plugin cuts it: schedule/model/pattern.py."""

from types import ModuleType
from typing import Any

from ...console.errors import UserError
from ...schedule.model.chunks import name_of
from ...schedule.model.pattern import flag_of, parts_of
from ..seams import names_read


def allocation() -> ModuleType:
    """Return Megatron's module about patterns, which stood elsewhere before 0.18."""
    try:
        from megatron.core.models.hybrid import hybrid_layer_allocation
    except ModuleNotFoundError:
        from megatron.core.ssm import mamba_hybrid_layer_allocation

        return mamba_hybrid_layer_allocation  # type: ignore[no-any-return]
    return hybrid_layer_allocation  # type: ignore[no-any-return]


def check_pattern(args: Any) -> None:
    """Refuse a pattern that Megatron's parser refuses."""
    flag = flag_of(args)
    text = getattr(args, name_of(flag))
    try:
        allocation().parse_hybrid_pattern(text)
    except ValueError as error:  # how Megatron refuses
        raise UserError(f"{flag} '{text}': {' '.join(str(error).split())}.\n  Change the pattern.") from None


def check_experts(args: Any) -> None:
    """Refuse ranks without experts beside ranks with, where Megatron cannot log the losses of routers then.

    Before 0.20 training_log sums arrays of two lengths over the pipeline ranks: one entry for each layer where a router
    has recorded a loss, and one for each layer of experts elsewhere. NCCL then hangs, under any schedule.
    """
    from megatron.training.training import training_log

    flag = flag_of(args)
    pattern, mtp = parts_of(args, flag)
    segments, pp_size = pattern.split("|"), args.pipeline_model_parallel_size
    segments[-1] += "".join(mtp)
    without = [str(rank) for rank in range(pp_size) if "E" not in "".join(segments[rank::pp_size])]
    if (
        not 0 < len(without) < pp_size
        or not _logs_routers(args)
        or "get_hybrid_layer_counts" not in names_read(training_log)
    ):
        return
    raise UserError(
        f"{flag} '{pattern}' leaves pipeline ranks {', '.join(without)} of {pp_size} without a layer E: this Megatron "
        "would hang when it logs the routers' losses, under any schedule.\n"
        "  Put the | so that each rank has an E, use other numbers of ranks or chunks, leave out --moe-aux-loss-coeff "
        "and --moe-z-loss-coeff, or use Megatron 0.20 or later."
    )


def _logs_routers(args: Any) -> bool:
    """Return whether routers record a loss, which Megatron then logs."""
    balancing, coefficients = (
        each if isinstance(each, list) else [each]
        for each in (
            getattr(args, "moe_router_load_balancing_type", None),
            getattr(args, "moe_aux_loss_coeff", None),
        )
    )
    is_balanced = any("aux_loss" in str(each) for each in balancing) and any(coefficients)
    return is_balanced or getattr(args, "moe_z_loss_coeff", None) is not None

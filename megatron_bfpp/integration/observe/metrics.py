"""The metrics that the plugin measures and predicts of a step beside Megatron's. Names as in the files of a run."""

import resource
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from ...schedule import PipelineShape, interleaved_1f1b, simulate
from ...schedule.orders import one_f_one_b
from .. import process
from ..flags.batches import microbatches_now, shape_of
from ..flags.settings import is_sharded, settings_of
from ..process import this_device

# Drawn in TensorBoard and W&B, under bfpp/. The others are lists, or stand in the files of a run only.
CHARTS = (
    "tokens_per_s_per_gpu",
    "peak_memory_gib_max_rank",
    "bubble_fraction_predicted",
    "bubble_fraction_measured",
    "exposed_dp_s",
)


def of_step(args: Any, step: int, step_time_s: float | None) -> dict[str, Any]:
    """Return the metrics of the step that has just ended. Collective over all ranks at log intervals."""
    found: dict[str, Any] = {"tokens_per_s_per_gpu": None}
    if step_time_s is not None:
        found["tokens_per_s_per_gpu"] = tokens_per_step(args) / step_time_s / args.world_size
    if step % args.log_interval == 0:
        peak, rank = peak_memory()
        found |= {"peak_memory_gib_max_rank": peak / 2**30, "peak_memory_rank": rank}
    return found | process.RECORDING.measured


def charts(args: Any, found: dict[str, Any]) -> dict[str, float]:
    """Return `found` as TensorBoard and W&B take it, with the prediction; of a time per rank the longest."""
    values = {"bubble_fraction_predicted": predicted_bubble(args), **found}
    chosen = {name: values[name] for name in CHARTS if values.get(name) is not None}
    return {f"bfpp/{name}": max(value) if isinstance(value, list) else value for name, value in chosen.items()}


def tokens_per_step(args: Any) -> int:
    """Return the tokens of the step that runs now, over all replicas."""
    return int(args.micro_batch_size * args.data_parallel_size * microbatches_now() * args.seq_length)


def peak_memory() -> tuple[int, int]:
    """Return the most bytes that a rank has used so far, and that rank. Collective; one number travels.

    On CUDA the memory that torch has allocated for tensors, as Megatron reports it; on a CPU the resident set.
    """
    if torch.cuda.is_available():
        own = torch.cuda.max_memory_allocated()
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ranks = dist.get_world_size()
    number = torch.tensor(own // 1024 * ranks + dist.get_rank(), dtype=torch.int64, device=this_device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    kib, rank = divmod(int(number), ranks)
    return kib * 1024, rank


def predicted_bubble(args: Any) -> float | None:
    """Return the bubble of the step that runs now, a fraction; None without a pipeline.

    Stages are taken as equal, and a backward as two forwards.
    """
    shape, settings = shape_of(args, microbatches_now()), settings_of(args)
    if shape is None:
        return None
    if settings.schedule == "1f1b":
        return _bubble_of_1f1b(shape, getattr(args, "microbatch_group_size_per_vp_stage", None))
    return settings.plan_of(shape, is_sharded=is_sharded(args)).bubble_fraction


@lru_cache(maxsize=64)
def _bubble_of_1f1b(shape: PipelineShape, group: int | None) -> float:
    order = one_f_one_b(shape) if shape.num_chunks == 1 else interleaved_1f1b(shape, group)
    return simulate(order, shape).bubble_fraction

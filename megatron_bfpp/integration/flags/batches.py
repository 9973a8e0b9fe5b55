"""The micro-batches of a job's steps, from its arguments, and the warning where they are too few."""

from typing import Any

from ...console.errors import UserError
from ...schedule import PipelineShape
from ...schedule.model.chunks import predicted_bubble

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def batch_sizes(args: Any) -> tuple[list[int], str]:
    """Return every global batch size of the job, smallest first, and the flag that makes it grow ("" if none does)."""
    last = args.global_batch_size or (args.micro_batch_size or 1) * data_parallel_size(args)
    steps = getattr(args, "step_batch_size_schedule", None)
    if steps is not None:
        return _sizes_of_steps(steps), "--step-batch-size-schedule"
    # Releases with a schedule of steps ignore the older flag.
    ramp = None if hasattr(args, "step_batch_size_schedule") else getattr(args, "rampup_batch_size", None)
    if ramp:
        first, increment = int(ramp[0]), max(1, int(ramp[1]))
        return sorted({*range(first, last, increment), last}), "--rampup-batch-size"
    return [last], ""


def data_parallel_size(args: Any) -> int:
    """Count the replicas that share a global batch; also from arguments that Megatron has not validated yet."""
    if getattr(args, "data_parallel_size", None) is not None:
        return int(args.data_parallel_size * getattr(args, "gtp_weight_remat_size", 1))
    model_parallel: int = (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * getattr(args, "context_parallel_size", 1)
    )
    return max(1, int(args.world_size) // model_parallel)


def microbatch_counts(args: Any) -> list[int]:
    """Return the micro-batches of a training step for every batch size of the job, smallest first."""
    per_microbatch = (args.micro_batch_size or 1) * data_parallel_size(args)
    return sorted({max(1, size // per_microbatch) for size in batch_sizes(args)[0]})


def evaluation_microbatches(args: Any) -> int:
    """Return the micro-batches of an evaluation step; validated arguments."""
    micro_batch: int = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
    size: int = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
    return max(1, size // (micro_batch * data_parallel_size(args)))


def microbatches_now() -> int:
    """Return the micro-batches of the training step that runs now, from Megatron's own counter."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()  # type: ignore[no-any-return]


def shape_of(args: Any, num_microbatches: int) -> PipelineShape | None:
    """Return the shape of a step of so many micro-batches; None without pipeline ranks. Validated arguments."""
    if args.pipeline_model_parallel_size < 2:
        return None
    chunks = args.virtual_pipeline_model_parallel_size or 1
    return PipelineShape(args.pipeline_model_parallel_size, chunks, num_microbatches)


def few_microbatches(args: Any) -> list[str]:
    """Return the warning where steps have fewer micro-batches than pipeline ranks: valid, but slow."""
    pp_size, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    counts, (sizes, growing) = microbatch_counts(args), batch_sizes(args)
    few = counts[0]
    if few >= pp_size:
        return []
    bubbles = {count: predicted_bubble(PipelineShape(pp_size, chunks, count)) for count in (few, pp_size)}
    replicas = data_parallel_size(args)
    enough = pp_size * args.micro_batch_size * replicas
    if growing:
        when = f" while the batch is small ({growing}: {few} to {counts[-1]} micro-batches a step)"
        change = f"Begin {growing} with {enough} or more"
    else:
        when, change = "", f"Raise --global-batch-size to {enough}"
    smaller = sizes[0] // (pp_size * replicas)
    if smaller and sizes[0] % (smaller * replicas) == 0:
        change += f", or lower --micro-batch-size to {smaller}"
    cost = f"predicted bubble {bubbles[few]:.0%} of the step ({bubbles[pp_size]:.0%} with {pp_size} micro-batches)"
    source = f"{few} = global batch {sizes[0]} / (micro batch {args.micro_batch_size} x data parallel {replicas})"
    return [f"WARNING: {few} micro-batches for {pp_size} pipeline ranks{when}: {cost}.\n  {source}. {change}."]


def _sizes_of_steps(steps: str) -> list[int]:
    """Return the sizes of "0:768 250B:1536" (TOKENS:BATCH); numbers as Megatron reads them, 1.5K is 1500."""
    sizes = set()
    for step in steps.replace(",", " ").split():
        number = step.partition(":")[2].strip().upper()
        factor = _SUFFIXES.get(number[-1:], 1)
        try:
            sizes.add(int(float(number.rstrip("KMBT")) * factor))
        except ValueError:
            raise UserError(
                f"--step-batch-size-schedule {steps}: {step!r} is not TOKENS:BATCH.\n  Write it as 0:768 250B:1536."
            ) from None
    return sorted(sizes)

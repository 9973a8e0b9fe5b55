"""Which of Megatron's functions are wrapped for the flags and variables that ask for logs, metrics and traces.

A job that asks for nothing has none of them wrapped.
"""

from __future__ import annotations

import os
from typing import Any

from ...console.errors import UserError
from .. import process, seams
from ..flags.settings import run_dir_of, trace_steps_of
from . import step_log

TRACE_FILE = "bfpp-trace.json"  # without a folder of the run


def observe(args: Any) -> list[str]:
    """Apply the seams; lines to tell. UserError for what cannot be traced. args: before Megatron completes them."""
    steps, folder, path = trace_steps_of(args), run_dir_of(args), os.environ.get("BFPP_STEP_LOG") or None
    if steps is not None:
        _refuse_traces(args, steps)
    counts = path is not None or folder is not None or getattr(args, "bfpp_log_communication", False)
    charts = getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None)
    if not (counts or charts or steps):
        return []
    # From here on Megatron is imported, whose arguments are being read.
    from megatron.training.global_vars import get_args

    from . import run_files, tracing

    run = None
    if folder is not None:
        run = run_files.Run(folder)
        process.ON_END.append(run.end)
        for seam, replace in run_files.keeping(run, get_args).items():
            seams.apply(seam, replace)
    if counts:
        step_log.TRAFFIC.install()
    seams.apply(step_log.SEAM, step_log.logging_steps(path, run))
    if steps is None:
        return []
    trace = TRACE_FILE if folder is None else os.path.join(folder, "trace.json")
    picture = None if folder is None else os.path.join(folder, "timeline.svg")
    seams.apply(tracing.TRAIN_STEP, tracing.tracing(steps, trace, picture, get_args))
    return [f"tracing steps {steps[0]} to {steps[1]} on the pipeline ranks of the first replica, into {trace}"]


def _refuse_traces(args: Any, steps: tuple[int, int]) -> None:
    if args.pipeline_model_parallel_size < 2:
        raise UserError(
            f"--bfpp-trace-steps needs pipeline ranks, but --pipeline-model-parallel-size is "
            f"{args.pipeline_model_parallel_size}.\n"
            "  Use --pipeline-model-parallel-size 2 or more, or leave it out."
        )
    last = getattr(args, "train_iters", None)
    if last and steps[0] > last:
        raise UserError(
            f"--bfpp-trace-steps begins with step {steps[0]}, but --train-iters is {last}.\n"
            f"  Use steps from 1 to {last}."
        )
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        raise UserError(
            "--bfpp-trace-steps does not work with --overlap-moe-expert-parallel-comm: a forward and a backward run "
            "as one there.\n"
            "  Leave out one of them."
        )
    if getattr(args, "cuda_graph_impl", None) == "full_iteration" or "full_iteration" in str(
        getattr(args, "cuda_graph_scope", "")
    ):
        raise UserError(
            "--bfpp-trace-steps does not work with CUDA graphs of a whole step: nothing of it runs on the host.\n"
            "  Use --cuda-graph-impl none for the traced run."
        )

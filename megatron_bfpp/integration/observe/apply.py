"""Wrap the functions of Megatron that the flags and variables for logs, metrics and traces need.

A job that asks for nothing has none of them wrapped.
"""

import os
from functools import partial
from typing import Any

from ...console.errors import UserError
from .. import process, relied_on, seams
from ..flags.settings import run_dir_of, trace_steps_of
from ..relied_on.training import TRACED_STEP, TRAINING_LOG
from . import step_log

TRACE_FILE = "bfpp-trace.json"  # without a folder of the run


def observe(args: Any) -> list[str]:
    """Apply the seams and return lines to print. UserError for what cannot be traced.

    args: before Megatron completes them.
    """
    steps, folder, path = trace_steps_of(args), run_dir_of(args), os.environ.get("BFPP_STEP_LOG") or None
    if steps is not None:
        _refuse_traces(args, steps)
    counts = path is not None or folder is not None or getattr(args, "bfpp_log_communication", False)
    charts = getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None)
    if not (counts or charts or steps):
        return []
    relied_on.check(relied_on.LOGS, *([relied_on.TRACES] if steps is not None else []))
    from . import run_files, tracing  # they import Megatron

    run = None
    if folder is not None:
        run = run_files.Run(folder)
        with seams.together(run) as undo:
            process.ON_END.append(run.end)
            undo.callback(process.ON_END.remove, run.end)
        for seam, begins, finishes in run_files.SEAMS:
            seams.apply(seam, partial(run.around, begins, finishes))
    if counts:
        step_log.TRAFFIC.install()
    seams.apply(TRAINING_LOG, step_log.StepLog(path, run).around)
    if steps is None:
        return []
    trace = TRACE_FILE if folder is None else os.path.join(folder, "trace.json")
    picture = None if folder is None else os.path.join(folder, "timeline.svg")
    seams.apply(TRACED_STEP, tracing.Tracing(steps, trace, picture).around)
    return [f"tracing steps {steps[0]} to {steps[1]} on the pipeline ranks of the first replica, into {trace}"]


def _refuse_traces(args: Any, steps: tuple[int, int]) -> None:
    pp_size, last = args.pipeline_model_parallel_size, getattr(args, "train_iters", None)
    graphs = getattr(args, "cuda_graph_impl", None), str(getattr(args, "cuda_graph_scope", ""))
    if pp_size < 2:
        why = f"needs pipeline ranks, but --pipeline-model-parallel-size is {pp_size}"
        instead = "Use --pipeline-model-parallel-size 2 or more, or leave it out"
    elif last and steps[0] > last:
        why = f"begins with step {steps[0]}, but --train-iters is {last}"
        instead = f"Use steps from 1 to {last}"
    elif getattr(args, "overlap_moe_expert_parallel_comm", False):
        why = "does not work with --overlap-moe-expert-parallel-comm: a forward and a backward run as one there"
        instead = "Leave out one of them"
    elif graphs[0] == "full_iteration" or "full_iteration" in graphs[1]:
        why = "does not work with CUDA graphs of a whole step: nothing of it runs on the host"
        instead = "Use --cuda-graph-impl none for the traced run"
    else:
        return
    raise UserError(f"--bfpp-trace-steps {why}.\n  {instead}.")

"""A file of what every step gave, to compare runs bit for bit: one JSON object per line, under any schedule.

Set BFPP_STEP_LOG=PATH. The last rank, where Megatron prints its losses, appends
    {"step": 1, "lm loss": 5.53, "lm loss hex": "0x1.62...p+2", "grad norm": 2.1, "grad norm hex": ..., "step_time_s": 0.4}
with every loss of the step by its name; hex holds all bits. step_time_s: from the step before, null for the first one.
"communication" has what this rank has sent since the step before, by parallel dimension and kind (runtime/traffic.py).

--bfpp-log-communication has the same counts in Megatron's log, in TensorBoard and in W&B, without a file.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .. import __version__
from ..runtime.traffic import Traffic
from .seams import Seam

SEAM = Seam("megatron.training.training", "training_log", ("loss_dict", "iteration", "grad_norm"))


# In the names that Megatron gives its process groups; the first that fits.
_DIMENSIONS = (
    ("TENSOR_AND", "other"), ("EXPERT_TENSOR_MODEL", "other"), ("DATA_PARALLEL", "data-parallel"), ("INTRA_DISTRIBUTED_OPTIMIZER", "data-parallel"),
    ("EXPERT_TENSOR", "tensor-parallel"), ("TENSOR_MODEL", "tensor-parallel"), ("CONTEXT", "context-parallel"),
    ("EXPERT_MODEL", "expert-parallel"), ("PIPELINE", "pipeline-parallel"), ("BFPP", "pipeline-parallel"),
    ("default_pg", "all ranks"),
)  # fmt: skip


def dimension(group: dist.ProcessGroup, kind: str) -> str:
    """data-parallel, tensor-parallel, ... of a process group of Megatron's or of the plugin's; "other" of any else."""
    if kind == "send" and group.group_desc == "default_pg":
        return "pipeline-parallel"  # with two pipeline ranks Megatron sends in one direction through the group of all ranks
    return next((name for part, name in _DIMENSIONS if part in group.group_desc), "other")


TRAFFIC = Traffic(dimension)  # of this process


def logging_steps(path: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The replacement of Megatron's training_log that also writes to `path`, and does what --bfpp-log-communication asks for."""

    def replace(training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)
        previous: float | None = None
        TRAFFIC.install()

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal previous
            given = signature.bind(*args, **kwargs).arguments
            before, previous = previous, time.perf_counter()
            counts = TRAFFIC.taken()
            is_last = dist.get_rank() == dist.get_world_size() - 1
            if path is not None and is_last:
                entry = _entry(given, None if before is None else previous - before) | {"communication": counts}
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")  # one write per line: a killed run leaves whole lines
            answer = training_log(*args, **kwargs)
            if is_last:
                _tell(counts, given["iteration"])
            return answer

        return wrapper

    return replace


def _entry(given: dict[str, Any], step_time_s: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": given["iteration"]}
    values = {name: float(value) for name, value in given["loss_dict"].items()}
    if given["grad_norm"] is not None:
        values["grad norm"] = float(given["grad_norm"])
    for name, value in values.items():
        entry[name], entry[f"{name} hex"] = value, value.hex()
    return {**entry, "step_time_s": step_time_s}


def _tell(counts: dict[str, dict[str, int]], step: int) -> None:
    from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer

    args = get_args()
    if not getattr(args, "bfpp_log_communication", False):
        return
    metrics = {f"bfpp/{name.replace(' ', '-')}-{unit}": value for name, count in counts.items() for unit, value in count.items()}
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if step % args.log_interval == 0:
        told = ", ".join(f"{name} {count['calls']} ({count['bytes'] / 2**20:.1f} MiB)" for name, count in counts.items())
        print(f"megatron_bfpp {__version__}: step {step}, this rank sent: {told}", flush=True)
    if step % args.tensorboard_log_interval == 0:
        for name, value in metrics.items():
            if tensorboard:
                tensorboard.add_scalar(name, value, step)
        if wandb:
            wandb.log(metrics, step)

"""The results of every step in a file, to compare runs bit for bit: one JSON object per line, under any schedule.

Set BFPP_STEP_LOG=PATH. The last rank, where Megatron prints its losses, appends
    {"step": 1, "lm loss": 5.53, "lm loss hex": "0x1.62...p+2", "grad norm": 2.1, ..., "step_time_s": 0.4}
with every loss of the step by its name; hex holds all bits. step_time_s: from the step before, null for the first one.
"communication" has what this rank has sent since the step before, by parallel dimension and kind (traffic.py).

--bfpp-log-communication has the same counts in Megatron's log, in TensorBoard and in W&B, without a file.
The lines of a run's steps.jsonl (run_files.py) begin with the same fields; those of metrics.py follow. Where Megatron
has a TensorBoard or W&B writer, the charts bfpp/... stand beside its own.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...console.files import append_line
from ..process import megatron_args, say
from .traffic import Traffic

if TYPE_CHECKING:
    from .run_files import Run

# Parts of the names that Megatron gives its process groups, and their dimension; the first that fits.
_DIMENSIONS = (
    ("TENSOR_AND", "other"), ("EXPERT_TENSOR_MODEL", "other"),
    ("DATA_PARALLEL", "data-parallel"), ("INTRA_DISTRIBUTED_OPTIMIZER", "data-parallel"),
    ("EXPERT_TENSOR", "tensor-parallel"), ("TENSOR_MODEL", "tensor-parallel"), ("CONTEXT", "context-parallel"),
    ("EXPERT_MODEL", "expert-parallel"), ("PIPELINE", "pipeline-parallel"), ("BFPP", "pipeline-parallel"),
    ("default_pg", "all ranks"),
)  # fmt: skip


def dimension(group: dist.ProcessGroup, kind: str) -> str:
    """Return the dimension of a process group of Megatron's or of the plugin's; "other" for any else."""
    if kind == "send" and group.group_desc == "default_pg":
        return "pipeline-parallel"  # with two pipeline ranks Megatron sends one way through the group of all ranks
    return next((name for part, name in _DIMENSIONS if part in group.group_desc), "other")


TRAFFIC = Traffic(dimension)  # of this process


@dataclass
class StepLog:
    """Writes to `path` and to the run's folder beside Megatron's training_log, and draws charts."""

    path: str | None
    run: "Run | None"
    previous: float | None = None  # when the step before ended

    def around(self, training_log: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from . import metrics

        given = inspect.signature(training_log).bind(*args, **kwargs).arguments
        before, self.previous = self.previous, time.perf_counter()
        step, step_time_s = given["iteration"], None if before is None else self.previous - before
        options = megatron_args()
        found, counts = metrics.of_step(options, step, step_time_s), TRAFFIC.taken()
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if self.path is not None or self.run is not None:
            # Only then: reading a loss waits for the device.
            entry = _entry(given, step_time_s) | {"communication": counts} if is_last else {}
            if self.path is not None and is_last:
                append_line(self.path, entry)
            if self.run is not None:
                self.run.add(step, entry | found)
        answer = training_log(*args, **kwargs)
        if is_last:
            _chart(options, step, metrics.charts(options, found), counts)
        return answer


def _entry(given: dict[str, Any], step_time_s: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": given["iteration"]}
    values = {name: float(value) for name, value in given["loss_dict"].items()}
    if given["grad_norm"] is not None:
        values["grad norm"] = float(given["grad_norm"])
    for name, value in values.items():
        entry[name], entry[f"{name} hex"] = value, value.hex()
    return {**entry, "step_time_s": step_time_s}


def _chart(args: Any, step: int, charts: dict[str, float], counts: dict[str, dict[str, int]]) -> None:
    """Give the charts to TensorBoard and W&B, and with --bfpp-log-communication the counts to the log too."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    if getattr(args, "bfpp_log_communication", False):
        for name, count in counts.items():
            charts |= {f"bfpp/{name.replace(' ', '-')}-{unit}": value for unit, value in count.items()}
        if step % args.log_interval == 0:
            sent = (f"{name} {count['calls']} ({count['bytes'] / 2**20:.1f} MiB)" for name, count in counts.items())
            say(f"step {step}, this rank sent: {', '.join(sent)}")
    # As often as Megatron's own; traced steps are few.
    if step % args.tensorboard_log_interval == 0 or "bfpp/bubble_fraction_measured" in charts:
        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in charts.items():
            if tensorboard:
                tensorboard.add_scalar(name, value, step)
        if wandb:
            wandb.log(charts, step)

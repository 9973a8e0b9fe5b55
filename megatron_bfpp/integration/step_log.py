"""A file of what every step gave, to compare runs bit for bit: one JSON object per line, under any schedule.

Set BFPP_STEP_LOG=PATH. The last rank, where Megatron prints its losses, appends
    {"step": 1, "lm loss": 5.53, "lm loss hex": "0x1.62...p+2", "grad norm": 2.1, "grad norm hex": ..., "step_time_s": 0.4}
with every loss of the step by its name; hex holds all bits. step_time_s: from the step before, null for the first one.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .seams import Seam

SEAM = Seam("megatron.training.training", "training_log", ("loss_dict", "iteration", "grad_norm"))


def logging_steps(path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The replacement of Megatron's training_log that also writes to `path`."""

    def replace(training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)
        previous: float | None = None

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal previous
            given = signature.bind(*args, **kwargs).arguments
            before, previous = previous, time.perf_counter()
            if dist.get_rank() == dist.get_world_size() - 1:
                entry = _entry(given, None if before is None else previous - before)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")  # one write per line: a killed run leaves whole lines
            return training_log(*args, **kwargs)

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

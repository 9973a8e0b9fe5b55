"""The kernels of a step, read from the Chrome trace of torch's profiler. Standard library only.

A kernel belongs to the action within whose range (PP:2F0) the host launched it. While an action runs, only its own
kernels are launched, on whatever thread.
"""

import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

from ...schedule.ir import RECEIVES, SENDS, Action

SEND, RECEIVE, COLLECTIVE, GEMM, OTHER = "send", "receive", "collective", "gemm", "other"
COMPUTE = (GEMM, OTHER)
_GEMM = re.compile(r"gemm|nvjet|cutlass|xmma", re.IGNORECASE)  # names of cuBLAS's and CUTLASS's kernels
_LAUNCHES = ("cuda_runtime", "cuda_driver")


class Kernel(NamedTuple):
    """A kernel; times in microseconds. action: "2F0", "" outside all actions. launch: by the host."""

    kind: str
    action: str
    launch: float
    start: float
    end: float


def read(path: Path) -> list[Kernel]:
    """Return the kernels of a trace in the order of their start."""
    return kernels_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def kernels_of(events: list[dict[str, Any]]) -> list[Kernel]:
    """Return the kernels among the events of a trace in the order of their start."""
    complete = [each for each in events if each.get("ph") == "X"]
    ranges = sorted(
        (each["ts"], each["ts"] + each["dur"], each["name"].removeprefix("PP:"))
        for each in complete
        if each.get("cat") == "user_annotation" and each["name"].startswith("PP:")
    )
    starts = [start for start, *_ in ranges]
    launched = {
        each["args"]["correlation"]: each["ts"]
        for each in complete
        if each.get("cat") in _LAUNCHES and "correlation" in each.get("args", {})
    }
    found = []
    for each in complete:
        if each.get("cat") == "kernel":
            launch = launched.get(each["args"].get("correlation"), each["ts"])
            place = bisect_right(starts, launch) - 1
            action = ranges[place][2] if place >= 0 and launch <= ranges[place][1] else ""
            found.append(Kernel(_kind(each["name"], action), action, launch, each["ts"], each["ts"] + each["dur"]))
    return sorted(found, key=lambda kernel: kernel.start)


def _kind(name: str, action: str) -> str:
    if not name.startswith("nccl"):
        return GEMM if _GEMM.search(name) else OTHER
    op = Action.parse(action).op if action else None
    return SEND if op in SENDS else RECEIVE if op in RECEIVES else COLLECTIVE

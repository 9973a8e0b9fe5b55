"""Faults to put into one rank of a job, as `prepare` of gpt.train: what happens, when, to whom."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path


def fault(kind: str, at_rank: int, folder: Path, step: int = 2, call: int = 4):
    """Return `prepare` for a fault of `kind` on rank `at_rank` in its call-th forward (or backward) of step `step`."""
    return functools.partial(_install, kind, at_rank, str(folder), step, call)


def happened(folder: Path) -> float:
    """When the fault happened, as time.time()."""
    return float((folder / "fault").read_text())


def _install(kind: str, at_rank: int, folder: str, step: int, call: int) -> list[str] | None:
    if int(os.environ["RANK"]) != at_rank:
        return None
    if kind in AT_START:
        return AT_START[kind]()
    from megatron.core.pipeline_parallel import schedules
    from megatron.training.global_vars import get_args

    name = "backward_step" if kind == "raise_in_backward" else "forward_step"
    original, calls = getattr(schedules, name), {}

    def wrapper(*args, **kwargs):
        now = get_args().curr_iteration + 1
        calls[now] = calls.get(now, 0) + 1
        if (now, calls[now]) == (step, call):
            Path(folder, "fault").write_text(repr(time.time()))
            IN_STEP[kind](Path(folder), args)
        return original(*args, **kwargs)

    setattr(schedules, name, wrapper)
    return None


def _kill(folder, args):
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(folder, args):
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(folder, args):
    raise ValueError("the fault of this test")


def _raise_in_hook(folder, args):
    """In a hook of autograd, which runs in a backward, in a thread of torch's for a CUDA model."""
    parameter = next(parameter for parameter in args[2].parameters() if parameter.requires_grad)

    def hook(grad):
        raise ValueError("the fault of this test")

    parameter.register_hook(hook)


def _nan(folder, args):
    import torch

    with torch.no_grad():
        for parameter in args[2].parameters():
            parameter.fill_(float("nan"))


def _sleep(folder, args):
    time.sleep(7)


def _fill_disk(folder, args):
    """Of the small disk that the checkpoints go to: 32 KiB are left."""
    disk = os.statvfs(folder / "small")
    (folder / "small" / "filler").write_bytes(b"\1" * max(0, disk.f_bavail * disk.f_bsize - 32 * 1024))


def _terminate(folder, args):
    os.kill(os.getpid(), signal.SIGTERM)


def _another_release():
    import megatron.core.package_info

    megatron.core.package_info.__version__ = "0.18.9"


def _send_another(folder, args):
    """Under --bfpp-debug-p2p: from here on this rank sends its messages under the name of the next micro-batch."""
    from megatron_bfpp.runtime import headers

    write = headers.write
    headers.write = lambda send, *rest: write(send._replace(microbatch=send.microbatch + 1), *rest)


IN_STEP = {
    "kill": _kill, "stop": _stop, "raise": _raise, "raise_in_backward": _raise, "raise_in_hook": _raise_in_hook,
    "nan": _nan, "sleep": _sleep, "fill_disk": _fill_disk, "terminate": _terminate, "send_another": _send_another,
}  # fmt: skip
AT_START = {
    "another_flag": lambda: ["--global-batch-size", "4"],
    "a_wrong_flag": lambda: ["--breadth-first-backward", "soon"],
    "another_schedule": lambda: ["--pipeline-schedule", "1f1b"],
    "another_release": _another_release,
}

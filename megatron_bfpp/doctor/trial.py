"""The equality run of bfpp doctor: two processes train a GPT of 13,000 parameters on PP 2 x 2 chunks with Megatron's
default order, then with breadth-first, from the same seed. Every loss and gradient norm must have the same bits.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..compare.losses import match
from ..compare.runs import Run, load
from ..schedule.names import SCHEDULES
from .jobs import DETERMINISTIC, PLAIN_LAYERS, TIMEOUT_S, Job, tiny

STEPS, RANKS, MICROBATCHES = 4, 2, 4
ARMS = {word: SCHEDULES[word].flags_for(MICROBATCHES) for word in ("interleaved", "breadth-first")}


def equality_job(arm: str, flags: list[str], pp: int, microbatches: int, device: str, folder: Path) -> Job:
    """Return the training of one arm in fp32: PP `pp` x 2 chunks, on a GPU with kernels that give the same bits."""
    words = [*tiny(pp, 2, microbatches, STEPS), *flags]
    on_gpu = device == "cuda"
    words += [*PLAIN_LAYERS, "--deterministic-mode"] if on_gpu else []
    return Job(arm, folder, device, pp, words, DETERMINISTIC if on_gpu else {})


class Trial(NamedTuple):
    """The result. reason: why it is not good, with the first error of a log; "" if it is. log_folder: then kept."""

    device: str
    is_equal: bool
    losses: list[float]
    reason: str
    seconds: float
    log_folder: str = ""


class ArmFailed(RuntimeError):
    """An arm did not train; the message has the first error of its ranks."""


def run_trial(device: str, on_step: Callable[[str, int], None]) -> Trial:
    """Train with both arms on "cpu" or "cuda". on_step(arm, steps done) is called ten times a second."""
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="bfpp-doctor-"))
    losses: list[float] = []
    keep = False
    try:
        for arm, flags in ARMS.items():
            job = equality_job(arm, flags, RANKS, MICROBATCHES, device, folder)
            with job.start() as ranks:
                codes = ranks.wait(TIMEOUT_S, on_wait=partial(_report, on_step, job))
            if failed := job.failure(codes):
                raise ArmFailed(failed)
        runs = load([str(folder / arm) for arm in ARMS])
        losses = [float(step.values.get("lm loss", math.nan)) for step in runs[1].steps]
        reason = verdict(*runs)
        keep = bool(reason)
    except ArmFailed as error:
        reason, keep = str(error), True
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return Trial(device, not reason, losses, reason, time.monotonic() - started, str(folder) if keep else "")


def verdict(reference: Run, run: Run) -> str:
    """Return why the two are not bit-identical trainings of STEPS steps; "" if they are."""
    for each in (reference, run):
        if not each.is_finished or len(each.steps) != STEPS:
            return f"{each.name} has {len(each.steps)} of {STEPS} steps: {each.reason or 'steps.jsonl is cut off'}"
    found = match(reference, run)
    if not found.is_comparable or not found.all_bits or found.unmatched or "grad norm" not in found.names:
        return f"losses and gradient norms were not all written: {', '.join(found.names) or 'none'}"
    for difference in (found.losses, found.gradient_norm):
        if difference is not None:
            size = f"{difference.largest:.3g} (relative)"
            return f"{difference.name} differs from step {difference.first_step} on, by up to {size}"
    return ""


def _report(on_step: Callable[[str, int], None], job: Job) -> None:
    on_step(job.name, job.steps())

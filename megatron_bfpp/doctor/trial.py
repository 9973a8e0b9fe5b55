"""The equality run of bfpp doctor: two processes train a GPT of 13,000 parameters on PP 2 x 2 chunks with Megatron's
default order, then with breadth-first, from the same seed. Every loss and gradient norm must have the same bits.
"""

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..compare.losses import match
from ..compare.runs import Run, load
from ..console.processes import Ranks, first_error, free_port, package_on_path, rank_environment, stoppable
from ..schedule.names import SCHEDULES

STEPS, RANKS, MICROBATCHES = 4, 2, 4
ARMS = {word: SCHEDULES[word].flags_for(MICROBATCHES) for word in ("interleaved", "breadth-first")}
TIMEOUT_S = 300.0  # for an arm, which takes 15 s; imports from a network file system can take minutes
MODEL = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 64 --lr 1e-2 --seed 1234 --attention-dropout 0 --hidden-dropout 0 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --split 1,0,0 --num-workers 0 --micro-batch-size 1 "
    f"--global-batch-size {MICROBATCHES} --train-iters {STEPS}"
).split()
# They need neither Apex nor Transformer Engine, and their kernels give the same bits twice.
GPU_FLAGS = [
    *("--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    *("--no-masked-softmax-fusion", "--deterministic-mode"),
]
GPU_ENVIRONMENT = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
# Variables of a launcher around this command, and those that would lead the two ranks elsewhere.
_NOT_OURS = ("SLURM_", "TORCHELASTIC_", "BFPP_", "WANDB_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


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
        with stoppable():
            for arm, flags in ARMS.items():
                _train(arm, flags, device, folder, on_step)
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


def _train(arm: str, flags: list[str], device: str, folder: Path, on_step: Callable[[str, int], None]) -> None:
    """Train with one arm. ArmFailed if a rank fails or the time is over."""
    words = [*MODEL, *(GPU_FLAGS if device == "cuda" else []), *flags, "--bfpp-run-dir", str(folder / arm)]
    words += ["--data-cache-path", str(folder / "cache")]
    command = [sys.executable, "-m", "megatron_bfpp.pretrain_gpt", "--device", device, *words]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
    kept |= {"PYTHONPATH": package_on_path(), "PYTHONWARNINGS": "ignore"}
    logs, port, steps = (
        [folder / f"{arm}.rank{rank}.log" for rank in range(RANKS)],
        free_port(),
        folder / arm / "steps.jsonl",
    )
    with Ranks() as ranks:
        for rank, log in enumerate(logs):
            ours = rank_environment(rank, RANKS, port) | (GPU_ENVIRONMENT if device == "cuda" else {})
            ranks.start(command, log, kept | ours)
        codes = ranks.wait(
            TIMEOUT_S, on_wait=lambda: on_step(arm, steps.read_bytes().count(b"\n") if steps.is_file() else 0)
        )
    for rank, code in enumerate(codes):
        if code:
            raise ArmFailed(f"{arm}: rank {rank} ended with {code}: {_last_words(logs[rank])}")
    if None in codes:
        raise ArmFailed(f"{arm} did not end within {TIMEOUT_S:.0f} s; rank 0 reported last: {_last_words(logs[0])}")


def _last_words(log: Path) -> str:
    """Return the first error of a log, else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (first_error(log) or (lines or ["nothing"])[-1]).strip()[:300]

"""bfpp doctor's last line: two processes train a GPT of 13,000 parameters on PP 2 x 2 chunks with Megatron's 1F1B, then with
breadth-first, from the same seed; every loss and gradient norm must have the same bits. On two GPUs where there are two.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..compare.losses import match
from ..compare.runs import Run, load

STEPS, RANKS = 4, 2
ARMS = {
    "1f1b": ["--num-virtual-stages-per-pipeline-rank", "2"],
    "breadth-first": ["--num-virtual-stages-per-pipeline-rank", "2", "--pipeline-schedule", "breadth-first"],
}
TIMEOUT_S = 300.0  # for an arm, which takes 15 s; imports from a network file system can take minutes
MODEL = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --pipeline-model-parallel-size 2 "
    "--micro-batch-size 1 --global-batch-size 4 --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --lr 1e-2 --seed 1234 "
    "--attention-dropout 0 --hidden-dropout 0 --log-interval 1 --eval-iters 0 --eval-interval 1000 --split 1,0,0 --num-workers 0 "
    f"--train-iters {STEPS}"
).split()
# What needs neither Apex nor Transformer Engine, and whose kernels give the same bits twice.
GPU_FLAGS = "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --deterministic-mode"
GPU_ENVIRONMENT = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
# Of a launcher around this command, and what would lead the two ranks elsewhere.
_NOT_OURS = ("SLURM_", "TORCHELASTIC_", "BFPP_", "WANDB_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


class Trial(NamedTuple):
    """reason: why it is not good, with the end of a log; "" if it is. log_folder: kept where it is not."""

    device: str
    is_equal: bool
    losses: list[float]
    reason: str
    seconds: float
    log_folder: str = ""


class ArmFailed(RuntimeError):
    """An arm did not train; the message tells what its ranks said last."""


def run_trial(device: str, on_step: Callable[[str, int], None]) -> Trial:
    """device: "cpu" or "cuda". on_step(arm, steps done) is called about once a second."""
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="bfpp-doctor-"))
    losses: list[float] = []
    keep = True
    try:
        for arm, flags in ARMS.items():
            _train(arm, flags, device, folder, on_step)
        runs = load([str(folder / arm) for arm in ARMS])
        losses = [float(step.values.get("lm loss", math.nan)) for step in runs[1].steps]
        reason = verdict(*runs)
        keep = bool(reason)
    except ArmFailed as error:
        reason = str(error)
    finally:
        if not keep or sys.exc_info()[0] is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return Trial(device, not reason, losses, reason, time.monotonic() - started, str(folder) if keep else "")


def verdict(reference: Run, run: Run) -> str:
    """Why the two are not bit-identical trainings of STEPS steps; "" if they are."""
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
    words = [*MODEL, *(GPU_FLAGS.split() if device == "cuda" else ()), *flags, "--bfpp-run-dir", str(folder / arm)]
    words += ["--data-cache-path", str(folder / "cache")]
    command = [sys.executable, "-m", "megatron_bfpp.pretrain_gpt", "--device", device, *words]
    port = str(_free_port())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(RANKS):
            with open(folder / f"{arm}.rank{rank}.log", "wb") as log:
                # A session of its own: what a rank starts ends with it.
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                                  env=_environment(device, rank, port), start_new_session=True))  # fmt: skip
        _wait(arm, processes, folder, on_step)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(
    arm: str, processes: list[subprocess.Popen[bytes]], folder: Path, on_step: Callable[[str, int], None]
) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed:
            time.sleep(1)  # the other rank may be about to say more than that its peer is gone
            break
        if time.monotonic() > deadline:
            raise ArmFailed(
                f"{arm} did not end within {TIMEOUT_S:.0f} s; rank 0 said last: {_last_words(folder, arm, 0)}"
            )
        on_step(arm, _steps(folder / arm / "steps.jsonl"))
        time.sleep(0.5)
    for rank, process in enumerate(processes):
        if process.poll() not in (None, 0):
            raise ArmFailed(f"{arm}: rank {rank} ended with {process.returncode}: {_last_words(folder, arm, rank)}")


def _steps(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _last_words(folder: Path, arm: str, rank: int) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = (folder / f"{arm}.rank{rank}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["nothing"])[-1].strip()[:300]


def _environment(device: str, rank: int, port: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    ours: dict[str, Any] = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    return kept | {name: str(value) for name, value in ours.items()} | (GPU_ENVIRONMENT if device == "cuda" else {})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

"""Multi-process Megatron jobs without paying Megatron's import (7 s per process) for each: ranks are forked from a server
process that has imported it once, so every job still starts from a fresh, unused Megatron.
"""

import contextlib
import gc
import json
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import TCPStore

TIMEOUT_S = 240  # a job of 4 ranks takes about 5 s on 2 cores; this is for a hang
MODEL = [
    "--num-layers",
    "8",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "32",
    "--max-position-embeddings",
    "32",
    "--micro-batch-size",
    "1",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "128",
    "--lr",
    "1e-2",
    "--train-iters",
    "3",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--log-interval",
    "1",
    "--eval-iters",
    "0",
    "--eval-interval",
    "1000",
    "--split",
    "1,0,0",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["megatron.training.training", "megatron_bfpp.pretrain_gpt", "megatron_bfpp.integration.step.forward_backward",
     "megatron_bfpp.integration.gpt.script", __name__]
)  # fmt: skip
# In the server, once all is imported: the ranks' garbage collections then leave alone, and so do not copy, what they share.
gc.freeze()


@dataclass
class Seen:
    """What is seen of a job beside its output."""

    ended: dict[int, float] = field(
        default_factory=dict
    )  # rank -> time.time(), for ranks that have ended by themselves
    left: dict[int, list[str]] = field(default_factory=dict)  # rank -> processes that outlived it by 10 s


class JobError(AssertionError):
    """A rank failed or hung; the message ends with its log."""


def run_job(target, ranks: int, folder: Path, *args) -> list[str]:
    """Call target(*args) in `ranks` processes with torchrun's environment; every rank's output.

    Raises JobError with the output of the first rank that failed.
    """
    codes, outputs = run_ranks(target, ranks, folder, *args)
    for rank, code in enumerate(codes):
        if code != 0:
            how = "hung" if code is None else f"ended with {code}"
            raise JobError(f"rank {rank} {how}:\n" + outputs[rank][-4000:])
    return outputs


def run_ranks(target, ranks: int, folder: Path, *args, seen: Seen | None = None) -> tuple[list[int | None], list[str]]:
    """As run_job, for jobs that are meant to fail: every rank's exit code, None for a hang, and its output.

    A rank that ends with another code than 0 takes those along that then wait for it.
    """
    # The ranks meet at a store of this process, as under torchrun: rank 0 need not win a race for a free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        _context.Process(target=_rank, args=(target, rank, ranks, store.port, str(logs[rank]), args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    codes: list[int | None] = [None] * ranks
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while None in codes and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                process.join(0.05)
                codes[rank] = process.exitcode
                if seen is not None and codes[rank] is not None:
                    seen.ended.setdefault(rank, time.time())
            if any(codes):  # the others may wait for it until the process group's timeout
                deadline = min(deadline, time.monotonic() + 10)
        if seen is not None:
            seen.left = _left_by({rank: processes[rank].pid for rank in seen.ended})
    finally:
        for process in processes:
            _kill_group(process.pid)
            process.kill()
            process.join()
    return codes, [log.read_text() for log in logs]


def _left_by(leaders: dict[int, int]) -> dict[int, list[str]]:
    """Processes of the groups of ended ranks; those have 10 s to see that their rank is gone."""
    deadline = time.monotonic() + 10
    while True:
        left: dict[int, list[str]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                state, _, group = rest.split()[:3]
                for rank, leader in leaders.items():
                    if int(group) == leader and state != "Z":
                        left.setdefault(rank, []).append(name + ")")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _kill_group(leader: int | None) -> None:
    """A rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended before it could become a leader
        os.killpg(leader, signal.SIGKILL)


def _rank(target, rank: int, ranks: int, port: int, log: str, args: tuple) -> None:
    # A process group of its own: saving a checkpoint starts processes of 325 MiB that would outlive the rank.
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    code = 0
    try:
        target(*args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does with what nobody catches
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # ends what the rank has started, as Python's own end does
    os._exit(code)  # not Python's own end: destroying gloo's groups can wait for ranks that are gone


def train(folder: Path, ranks: int, *flags: str, prepare=None) -> list[dict]:
    """Train with our GPT entry point; per step every loss and gradient norm, all bits, as hexadecimal text.

    prepare: called in every rank before anything else; may return more flags.
    """
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    run_job(_train, ranks, folder, str(log), [*MODEL, *flags], prepare)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]


def validation_losses(folder: Path) -> list[str]:
    """What the job that ran last in `folder` printed as its validation losses, in order; six digits after the point."""
    logs = [log.read_text() for log in sorted(folder.glob("rank*.log"))]
    return [loss for log in logs for loss in re.findall(r"validation loss at .*?lm loss value: (\S+)", log)]


def refused(folder: Path, ranks: int, *flags: str) -> tuple[list[int | None], list[str]]:
    """Start our GPT entry point with flags that it should refuse; every rank's exit code and output."""
    model = [flag for flag in MODEL if not ("--data-path" in flags and flag == "--mock-data")]
    return run_ranks(_train, ranks, folder, str(folder / "steps.jsonl"), [*model, *flags])


def _train(log: str, flags: list[str], prepare=None) -> None:
    from megatron_bfpp import pretrain_gpt
    from megatron_bfpp.run import launch

    more = (prepare() or []) if prepare is not None else []
    os.environ["BFPP_STEP_LOG"] = log
    launch(["--device", "cpu", *flags, *more], pretrain_gpt.main)

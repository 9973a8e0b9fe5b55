"""Start jobs of several ranks without paying for Megatron's import (7 s) in each process.

The ranks are forked from a server process that has imported Megatron once, so every job starts from an unused Megatron.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.util
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import TCPStore

from megatron_bfpp.console.processes import Forked, Ranks, rank_environment

TIMEOUT_S = 240  # a job of 4 ranks takes about 5 s on 2 cores; this is for a hang
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["megatron.training.training", "megatron_bfpp.pretrain_gpt", "megatron_bfpp.integration.step.forward_backward",
     "megatron_bfpp.integration.gpt.script", __name__, "gpt"]
)  # fmt: skip
# In the server, once all is imported: the ranks' garbage collections then leave alone, and so do not copy, what they
# share.
gc.freeze()


@dataclass
class Seen:
    """What is seen of a job beside its output."""

    # rank -> time.time() of its end, for ranks that have ended by themselves
    ended: dict[int, float] = field(default_factory=dict)
    # rank -> processes that outlived it by 10 s
    left: dict[int, list[str]] = field(default_factory=dict)


class JobError(AssertionError):
    """A rank failed or hung; the message ends with its log."""


def run_job(target, ranks: int, folder: Path, *args) -> list[str]:
    """Call target(*args) in `ranks` processes with torchrun's environment; return every rank's output.

    Raises JobError with the output of the first rank that failed.
    """
    codes, outputs = run_ranks(target, ranks, folder, *args)
    for rank, code in enumerate(codes):
        if code != 0:
            how = "hung" if code is None else f"ended with {code}"
            raise JobError(f"rank {rank} {how}:\n" + outputs[rank][-4000:])
    return outputs


def run_ranks(target, ranks: int, folder: Path, *args, seen: Seen | None = None) -> tuple[list[int | None], list[str]]:
    """Run a job that may fail; return every rank's exit code, None for a hang, and every rank's output.

    After a rank has failed, the others have 10 s to end. What runs then is killed.
    """
    # The ranks meet at a store of this process, as under torchrun: rank 0 need not win a race for a free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes: list[Forked] = []
    with Ranks() as running:
        for rank in range(ranks):
            process = _context.Process(target=_rank, args=(target, rank, ranks, store.port, str(logs[rank]), args))
            process.start()
            processes.append(Forked(process))
            running.add(processes[-1])

        def note() -> None:
            if seen is not None:
                for rank, code in enumerate(running.codes()):
                    if code is not None:
                        seen.ended.setdefault(rank, time.time())

        # After a failure the others may wait for the rank that failed until the process group's timeout.
        codes = running.wait(TIMEOUT_S, linger_s=10, on_wait=note)
        note()
        if seen is not None:
            seen.left = _left_by({rank: processes[rank].pid for rank in seen.ended})
    return codes, [log.read_text() for log in logs]


def _left_by(leaders: dict[int, int]) -> dict[int, list[str]]:
    """Return the processes of the groups of ended ranks that are still there 30 s later."""
    deadline = time.monotonic() + 30
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


def _rank(target, rank: int, ranks: int, port: int, log: str, args: tuple) -> None:
    # A process group of its own: saving a checkpoint starts processes of 325 MiB that would outlive the rank.
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(rank_environment(rank, ranks, port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    code = 0
    try:
        target(*args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does with an error that nobody catches
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # ends the processes that the rank has started, as Python's own end does
    os._exit(code)  # not Python's own end: destroying gloo's groups can wait for ranks that are gone

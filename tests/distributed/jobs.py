"""Multi-process Megatron jobs without paying Megatron's import (7 s per process) for each: ranks are forked from a server
process that has imported it once, so every job still starts from a fresh, unused Megatron.
"""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

TIMEOUT_S = 240  # a job of 4 ranks takes about 5 s on 2 cores; this is for a hang
MODEL = (
    "--num-layers 8 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --lr 1e-2 --train-iters 3 "
    "--attention-dropout 0 --hidden-dropout 0 --log-interval 1 --eval-iters 0 --eval-interval 1000 --split 1,0,0"
).split()

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["megatron.training.training", "megatron_bfpp.pretrain_gpt", "megatron_bfpp.integration.forward_backward",
     "megatron_bfpp.integration.gpt", __name__]
)  # fmt: skip


class JobError(AssertionError):
    """A rank failed or hung; the message ends with its log."""


def run_job(target, ranks: int, folder: Path, *args) -> list[str]:
    """Call target(*args) in `ranks` processes with torchrun's environment; every rank's output.

    Raises JobError with the output of the first rank that failed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        _context.Process(target=_rank, args=(target, rank, ranks, port, str(logs[rank]), args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(TIMEOUT_S)
            if process.exitcode != 0:
                how = "hung" if process.exitcode is None else f"ended with {process.exitcode}"
                raise JobError(f"rank {rank} {how}:\n" + logs[rank].read_text()[-4000:])
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [log.read_text() for log in logs]


def _rank(target, rank: int, ranks: int, port: int, log: str, args: tuple) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    code = 0
    try:
        target(*args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not Python's own end: destroying gloo's groups can wait for ranks that are gone


def train(folder: Path, ranks: int, *flags: str) -> list[dict]:
    """Train with our GPT entry point; per step every loss and gradient norm, all bits, as hexadecimal text."""
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    run_job(_train, ranks, folder, str(log), [*MODEL, *flags])
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]


def _train(log: str, flags: list[str]) -> None:
    from megatron_bfpp import pretrain_gpt
    from megatron_bfpp.run import launch

    os.environ["BFPP_STEP_LOG"] = log
    launch(["--device", "cpu", *flags], pretrain_gpt.main)

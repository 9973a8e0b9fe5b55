"""The machine of a trial: how many ranks it takes, and how jobs are run on its GPUs."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

from ..jobs import PLAIN_LAYERS, TIMEOUT_S, Job, in_pipeline, last_words

MOST_RANKS = 8
# What a rank under observers runs: imports run downward, so the doctor starts the launcher and does not import it.
SCRIPT = """import sys
from megatron_bfpp.doctor.gpu_trial.rank import train
observers, folder = sys.argv[1:3]
del sys.argv[1:3]
train(observers, folder)
"""
OWN_QUEUES = 32  # of the hardware, where a row does not name a number: CUDA_DEVICE_MAX_CONNECTIONS
LINGER_S = 5.0  # for the other ranks of a job that is refused to say so


class JobFailed(RuntimeError):
    """A job did not train; the message has the first error of its ranks."""


class Ended(NamedTuple):
    """How a job ended. codes: None for a rank that had to be ended; said: its first error; failure: "" for none."""

    codes: list[int | None]
    seconds: float
    said: str
    failure: str


@dataclass
class Place:
    """The machine. gpus: those that torch sees; 1 is shared by two ranks, and without any jobs run on the CPU."""

    gpus: int
    has_te: bool
    facts: dict[str, Any]
    folder: Path
    on_wait: Callable[[], None] = lambda: None
    kept: dict[str, Any] = field(default_factory=dict)  # what one row has measured for others, by name

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def shares_card(self) -> bool:
        return self.gpus == 1

    @property
    def ranks(self) -> int:
        return max(2, min(self.gpus, MOST_RANKS))

    def job(self, name: str, ranks: int, words: list[str], connections: int = OWN_QUEUES, observers: str = "") -> Job:
        """Return a job of this machine, under observers of rank.py if any are named."""
        job = Job(name, self.folder, self.device, ranks, words, shares_card=self.shares_card)
        job = replace(job, environment={"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)})
        if not observers:
            return job
        job.run_folder.mkdir(exist_ok=True)
        script = job.run_folder / "observed.py"
        script.write_text(SCRIPT)
        return replace(job, module="megatron_bfpp.run", script=(str(script), observers, str(job.run_folder)))

    def large(self, pp: int, dp: int, chunks: int, microbatches: int, steps: int) -> list[str]:
        """Return the flags of a GPT in bf16 with layers like those of a 7B model, two for each pipeline rank."""
        words = f"""
            --num-layers {2 * pp} --hidden-size 4096 --num-attention-heads 32 --seq-length 2048 --vocab-size 1024
            --max-position-embeddings 2048 --micro-batch-size 2 --lr 1e-5 --bf16 --no-check-for-nan-in-loss-and-grad
            {in_pipeline(pp, chunks, 2 * microbatches * dp, steps)}
        """.split()
        words += self.layers() if self.has_te else [*self.layers(), "--recompute-activations"]
        zero1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
        return words + (zero1 if dp > 1 else [])

    def layers(self) -> list[str]:
        """Return the flags of Transformer Engine's layers, or of Megatron's own where it is not installed."""
        te = ["--transformer-impl", "transformer_engine", "--no-gradient-accumulation-fusion"]
        return te if self.has_te else list(PLAIN_LAYERS)

    def run(self, jobs: Sequence[Job]) -> list[Ended]:
        """Run jobs of equal size, side by side as far as there are GPUs, and return how each ended."""
        size = jobs[0].ranks
        devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))).split(",")
        ended = []
        for some in batched(jobs, max(1, self.gpus // size)):
            with ExitStack() as stack:
                started, running = time.monotonic(), []
                for place, job in enumerate(some):
                    own = {"CUDA_VISIBLE_DEVICES": ",".join(devices[place * size : (place + 1) * size])}
                    chosen = replace(job, environment=job.environment | (own if self.gpus else {}))
                    running.append((job, stack.enter_context(chosen.start())))
                for job, ranks in running:
                    codes = ranks.wait(TIMEOUT_S, LINGER_S, self.on_wait)
                    ranks.end()
                    first = next((rank for rank, code in enumerate(codes) if code != 0), 0)
                    said = last_words(job.logs[first])
                    ended.append(Ended(codes, time.monotonic() - started, said, job.failure(codes)))
        return ended

    def train(self, *jobs: Job) -> None:
        """Run jobs that must train. JobFailed if one does not."""
        for each in self.run(jobs):
            if each.failure:
                raise JobFailed(each.failure)

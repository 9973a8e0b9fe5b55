"""Train for half an hour on a CPU while ranks are killed, stopped and terminated at random; the losses must not notice.

    .venv/bin/python scripts/soak.py [--minutes 30] [--seed 1] [--ranks 2] [--folder DIR]

A job of pipeline ranks trains breadth-first and saves a checkpoint every few steps. Again and again something happens to it:
a rank, or all of them, get SIGKILL; a rank is stopped for ever (SIGSTOP), which the watchdog must end; the job gets
SIGTERM, at which Megatron saves and ends. It is started again each time. Then one job does the same steps undisturbed, and every
loss and gradient norm of every step, also those that were done twice, must have the same bits. Exit code 1 if not, or if a
process is left behind or a job does not end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_S = 30  # of the watchdog: a stopped rank costs that
MOST_END_S = 150  # torchrun gives ranks 30 s after a SIGTERM
MODEL = [
    "--num-layers",
    "8",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "64",
    "--max-position-embeddings",
    "64",
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--num-virtual-stages-per-pipeline-rank",
    "2",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "128",
    "--lr",
    "1e-3",
    "--lr-warmup-iters",
    "10",
    "--train-iters",
    "1000000",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--log-interval",
    "1",
    "--eval-iters",
    "0",
    "--eval-interval",
    "10000000",
    "--split",
    "1,0,0",
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--save-interval",
    "10",
    "--exit-signal-handler",
    "--pipeline-schedule",
    "breadth-first",
]
FAULTS = ("kill a rank", "kill all ranks", "stop a rank", "terminate")


class Job:
    """One start of the training, up to its end."""

    def __init__(self, folder: Path, log: Path, ranks: int, *flags: str):
        self.mark = f"BFPP_SOAK={folder}"
        self.output = folder / "output.txt"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "megatron_bfpp.pretrain_gpt", "--device", "cpu", "--pipeline-model-parallel-size", str(ranks)),
            *(
                *MODEL,
                "--bfpp-timeout-seconds",
                str(TIMEOUT_S),
                "--save",
                str(folder / "saved"),
                "--load",
                str(folder / "saved"),
            ),
            *flags,
        ]
        environment = {**os.environ, "BFPP_SOAK": str(folder), "BFPP_STEP_LOG": str(log), "OMP_NUM_THREADS": "1"}
        with open(self.output, "a", encoding="utf-8") as output:
            self.begin = output.tell()
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def said(self) -> str:
        """What this start has printed so far."""
        with open(self.output, encoding="utf-8", errors="replace") as output:
            output.seek(self.begin)
            return output.read()

    def ranks(self) -> list[int]:
        """The process ids of its ranks, in order."""
        found = {}
        for pid, environment in processes(self.mark):
            rank = re.search(r"\0RANK=(\d+)\0", environment)
            if rank and int(rank[1]) not in found:
                found[int(rank[1])] = pid  # the smallest: what a rank has started came after it
        return [found[rank] for rank in sorted(found)]

    def trains(self) -> bool:
        """Wait for its first step; False if it has ended before."""
        while "elapsed time per iteration" not in self.said():
            if self.process.poll() is not None:
                return False
            time.sleep(0.2)
        return True

    def end(self) -> None:
        """Wait for its end. SystemExit if it does not come, or something is left behind."""
        try:
            self.process.wait(MOST_END_S)
        except subprocess.TimeoutExpired:
            fail(f"the job did not end within {MOST_END_S} s; see {self.output}", self.mark)
        deadline = time.monotonic() + 20
        while left := [pid for pid, _ in processes(self.mark)]:
            if time.monotonic() > deadline:
                fail(f"processes {left} are left behind; see {self.output}", self.mark)
            time.sleep(0.5)


def processes(mark: str) -> Iterator[tuple[int, str]]:
    """Living processes with this in their environment, by process id."""
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            environment = "\0" + Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace") + "\0"
            if f"\0{mark}\0" in environment:
                yield pid, environment


def fail(why: str, mark: str) -> None:
    for pid, _ in processes(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit(f"soak: {why}")


def disturb(job: Job, fault: str, chance: random.Random) -> None:
    ranks = job.ranks()
    if fault == "terminate":
        job.process.send_signal(signal.SIGTERM)
    else:
        sign = signal.SIGSTOP if fault == "stop a rank" else signal.SIGKILL
        for pid in ranks if fault == "kill all ranks" else [chance.choice(ranks)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)


def steps_of(log: Path) -> list[tuple[int, dict[str, str]]]:
    """Every line of a step log: the step, and its losses and norms with all bits."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], {name: line[name] for name in line if name.endswith(" hex")}) for line in lines]


def saved(folder: Path) -> int:
    """The step of the last checkpoint; 0 before the first."""
    tracker = folder / "saved" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the two runs go; default: a temporary folder, removed if all is well"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bfpp-soak-", delete=False) as temporary:
        folder = options.folder or Path(temporary)
        done = run(folder, options.minutes, options.ranks, random.Random(options.seed))
    print(f"soak: {done}; the runs are in {folder}", flush=True)


def run(folder: Path, minutes: float, ranks: int, chance: random.Random) -> str:
    disturbed, whole = folder / "disturbed", folder / "undisturbed"
    for each in (disturbed, whole):
        each.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(FAULTS, 0)
    log, start = disturbed / "steps.jsonl", time.monotonic()
    while True:
        job = Job(disturbed, log, ranks)
        if job.trains():
            is_last = time.monotonic() - start > 60 * minutes
            fault = "terminate" if is_last else chance.choice(FAULTS)
            time.sleep(chance.uniform(0, 20))
            disturb(job, fault, chance)
            job.end()
            counts[fault] += 1
            last = steps_of(log)[-1][0]
            print(f"soak: {(time.monotonic() - start) / 60:5.1f} min, step {last:5d}: {fault}", flush=True)
            if is_last and saved(disturbed) == last:
                break
        else:
            fail(f"the job ended before its first step; see {job.output}", job.mark)
    print(f"soak: now {last} steps undisturbed", flush=True)
    job = Job(whole, whole / "steps.jsonl", ranks, "--exit-interval", str(last))
    job.process.wait()
    return compared(steps_of(log), steps_of(whole / "steps.jsonl"), counts)


def compared(
    disturbed: list[tuple[int, dict[str, str]]], whole: list[tuple[int, dict[str, str]]], counts: dict[str, int]
) -> str:
    """One line; SystemExit if a bit differs or a step is missing."""
    expected = dict(whole)
    wrong = [step for step, found in disturbed if found != expected.get(step)]
    missing = set(expected) - {step for step, _ in disturbed}
    if wrong or missing or len({str(each) for each in expected.values()}) < len(expected) / 2:
        sys.exit(f"soak: steps {wrong[:10]} differ, steps {sorted(missing)[:10]} are missing, of {len(expected)}")
    faults = ", ".join(f"{name} {count} times" for name, count in counts.items())
    twice = len(disturbed) - len(expected)
    return f"{len(expected)} steps bit-identical, {twice} of them done twice or more; {faults}"


if __name__ == "__main__":
    main()

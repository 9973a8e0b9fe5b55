"""Train for half an hour on a CPU while ranks are killed, stopped and terminated at random; the losses must not notice.

    .venv/bin/python scripts/soak.py [--minutes 30] [--seed 1] [--ranks 2] [--folder DIR]

A job of pipeline ranks trains breadth-first and saves a checkpoint every few steps. Again and again something happens
to it: a rank, or all of them, get SIGKILL; a rank is stopped for ever (SIGSTOP), which the watchdog must end; the job
gets SIGTERM, at which Megatron saves and ends. It is started again each time. Then one job does the same steps
undisturbed, and every loss and gradient norm of every step, also those that were done twice, must have the same bits.
Exit code 1 if not, or if a process is left behind or a job does not end.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from megatron_bfpp.console.processes import Ranks, end_marked, marked, stoppable

TIMEOUT_S = 30  # of the watchdog: a stopped rank costs that
MOST_END_S = 150  # torchrun gives ranks 30 s after a SIGTERM
MODEL = [
    "--num-layers", "8", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64",
    "--max-position-embeddings", "64", "--micro-batch-size", "1", "--global-batch-size", "8", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "128", "--lr", "1e-3", "--lr-warmup-iters", "10",
    "--train-iters", "1000000", "--attention-dropout", "0", "--hidden-dropout", "0", "--log-interval", "1",
    "--eval-iters", "0", "--eval-interval", "10000000", "--split", "1,0,0", "--use-distributed-optimizer",
    "--overlap-grad-reduce", "--overlap-param-gather", "--save-interval", "10", "--exit-signal-handler",
    "--num-virtual-stages-per-pipeline-rank", "2", "--pipeline-schedule", "breadth-first",
    "--bfpp-timeout-seconds", str(TIMEOUT_S),
]  # fmt: skip
FAULTS = ("kill a rank", "kill all ranks", "stop a rank", "terminate")
Steps = list[tuple[int, dict[str, str]]]  # per line of a step log: the step, and its losses and norms with all bits


class Job:
    """One start of the training, up to its end."""

    def __init__(self, folder: Path, ranks: int, *flags: str):
        self.mark, self.output = f"BFPP_SOAK={folder}", folder / "output.txt"
        saved = str(folder / "saved")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "-m", "megatron_bfpp.pretrain_gpt", "--device", "cpu", "--pipeline-model-parallel-size", str(ranks),
            *MODEL, "--save", saved, "--load", saved, *flags,
        ]  # fmt: skip
        ours = {"BFPP_SOAK": str(folder), "BFPP_STEP_LOG": str(folder / "steps.jsonl"), "OMP_NUM_THREADS": "1"}
        self.begin = self.output.stat().st_size if self.output.exists() else 0
        self.torchrun = Ranks(grace_s=MOST_END_S)
        self.torchrun.start(command, self.output, {**os.environ, **ours})

    def trains(self) -> bool:
        """Wait for the first step; return False if the job has ended before it."""
        while b"elapsed time per iteration" not in self.output.read_bytes()[self.begin :]:
            if self.torchrun.codes() != [None]:
                return False
            time.sleep(0.2)
        return True

    def disturb(self, fault: str, chance: random.Random) -> None:
        """Inflict a fault on the job, and wait for its end."""
        ranks = self._ranks()
        if fault == "terminate":
            self.torchrun.end()  # SIGTERM, and SIGKILL for a job that does not end
        else:
            number = signal.SIGSTOP if fault == "stop a rank" else signal.SIGKILL
            for pid in ranks if fault == "kill all ranks" else [chance.choice(ranks)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            self.torchrun.wait(MOST_END_S)
        self.check_end()

    def _ranks(self) -> list[int]:
        """Return the process ids of the ranks, in order."""
        found: dict[int, int] = {}
        for pid, environment in marked(self.mark).items():
            rank = re.search(r"\0RANK=(\d+)\0", environment)
            if rank:
                found.setdefault(int(rank[1]), pid)  # the smallest: a rank's own processes were started after it
        return [found[rank] for rank in sorted(found)]

    def check_end(self) -> None:
        """Exit if the job did not end by itself, or if it has left processes behind."""
        if self.torchrun.codes() in ([None], [-signal.SIGKILL]):
            self.fail(f"the job did not end within {MOST_END_S} s")
        deadline = time.monotonic() + 20
        while left := list(marked(self.mark)):
            if time.monotonic() > deadline:
                self.fail(f"processes {left} are left behind")
            time.sleep(0.5)

    def fail(self, reason: str) -> None:
        """End all of the job's processes, and exit."""
        end_marked(self.mark)
        sys.exit(f"soak: {reason}; see {self.output}")


def steps_of(folder: Path) -> Steps:
    """Return every line of a step log."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], {name: line[name] for name in line if name.endswith(" hex")}) for line in lines]


def saved_step(folder: Path) -> int:
    """Return the step of the last checkpoint; 0 before the first."""
    tracker = folder / "saved" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0


def main() -> None:
    """Soak, and print one line of the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the two runs go; default: a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bfpp-soak-"))
    disturbed, whole = folder / "disturbed", folder / "undisturbed"
    try:
        with stoppable():
            done = run(disturbed, whole, options.minutes, options.ranks, random.Random(options.seed))
    finally:
        for each in (disturbed, whole):
            end_marked(f"BFPP_SOAK={each}")
    print(f"soak: {done}; the runs are in {folder}", flush=True)


def run(disturbed: Path, whole: Path, minutes: float, ranks: int, chance: random.Random) -> str:
    """Train with faults until the time is over, then the same steps without; return the result in a line."""
    for each in (disturbed, whole):
        each.mkdir(parents=True, exist_ok=True)
    counts, start = dict.fromkeys(FAULTS, 0), time.monotonic()
    while True:
        job = Job(disturbed, ranks)
        if not job.trains():
            job.fail("the job ended before its first step")
        is_last = time.monotonic() - start > 60 * minutes
        fault = "terminate" if is_last else chance.choice(FAULTS)
        time.sleep(chance.uniform(0, 20))
        job.disturb(fault, chance)
        counts[fault] += 1
        last = steps_of(disturbed)[-1][0]
        print(f"soak: {(time.monotonic() - start) / 60:5.1f} min, step {last:5d}: {fault}", flush=True)
        if is_last and saved_step(disturbed) == last:
            break
    print(f"soak: now {last} steps undisturbed", flush=True)
    job = Job(whole, ranks, "--exit-interval", str(last))
    job.torchrun.wait()
    return compared(steps_of(disturbed), steps_of(whole), counts)


def compared(disturbed: Steps, whole: Steps, counts: dict[str, int]) -> str:
    """Return the result in a line; exit if a bit differs or a step is missing."""
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

"""The runs of an A/B, one after the other: what has finished is skipped, what has not starts anew, nothing is lost."""

import json
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..compare.runs import read
from ..console import progress
from ..console.errors import UserError
from ..console.files import write_whole
from ..console.processes import Ranks, Stopped, end_marked, first_error
from .job import Job, logging_flags
from .launchers import Launcher
from .settings import ABSettings

_GRACE_S = 60.0  # torchrun gives its ranks 30 s after a SIGTERM


def say(text: str) -> None:
    """Print a line of the log of the A/B."""
    print(f"bfpp ab: {text}", flush=True)


@dataclass(frozen=True)
class Rounds:
    """Every arm in every round. environment: of all commands."""

    settings: ABSettings
    launcher: Launcher
    arms: dict[str, Job]
    environment: Mapping[str, str]
    steps: int
    rounds: int
    dry_run: bool

    def run(self) -> None:
        """Run all; each round begins with another arm, so that none always runs first."""
        words = list(self.arms)
        for round_ in range(1, self.rounds + 1):
            start = (round_ - 1) % len(words)
            for arm in words[start:] + words[:start]:
                self._run_one(arm, round_)

    def folders(self) -> list[str]:
        """Return the directories of all runs, those of the first arm first: it is the reference."""
        return [
            str(self.settings.output / f"{arm}.{round_}") for arm in self.arms for round_ in range(1, self.rounds + 1)
        ]

    def _run_one(self, arm: str, round_: int) -> None:
        """Run one, with a directory of its own. A failure is recorded and does not stop the others."""
        name = f"{arm}.{round_}"
        folder, log = self.settings.output / name, self.settings.output / "logs" / f"{name}.log"
        if read(folder).is_finished:
            say(f"{name} has finished before: skipped")
            return
        # The check of every loss makes the host wait for the device after each micro-batch of the last stage.
        flags = ["--train-iters", str(self.steps), "--bfpp-run-dir", str(folder), "--no-check-for-nan-in-loss-and-grad"]
        flags += logging_flags(self.settings, name, folder)
        marks = {"BFPP_ARM": arm, "BFPP_ROUND": str(round_), "BFPP_RUN_DIR": str(folder)}
        command = self.arms[arm].words(self.settings, self.launcher, flags, marks)
        if self.dry_run:
            say(f"would run: {shlex.join(command)}")
            return
        try:
            _set_aside(folder)
            folder.mkdir(parents=True)
            log.parent.mkdir(exist_ok=True)
            log.unlink(missing_ok=True)
        except OSError as error:  # the others may still have room; the report names the missing run
            say(f"{name} FAILED: {error}")
            return
        say(f"{name}: {self.steps} steps, log in {log}")
        code, reason = self._train(command, folder, log, name)
        run = read(folder)
        if code or not run.is_finished:
            if run.end.get("status") != "failed":
                _record_failure(folder, reason)
            say(f"{name} FAILED: {reason}")

    def _train(self, command: list[str], folder: Path, log: Path, name: str) -> tuple[int, str]:
        """Return the exit code of the command, and why the run failed if it did."""
        code, progress_of_run = 1, _Progress(folder / "steps.jsonl", self.steps, name)
        try:
            with Ranks(_GRACE_S) as ranks:
                ranks.start(command, log, self.environment)
                code = ranks.wait(on_wait=progress_of_run.update)[0] or 0
        except OSError as error:
            return code, str(error)
        except Stopped:
            say("stopped by a signal; start it again to go on")  # without an end.json, the next start runs it again
            raise
        finally:
            progress.clear()
            if code:  # a torchrun that is killed leaves its ranks, which would train on beside the next arm
                end_marked(f"BFPP_RUN_DIR={folder}")
        return code, _reason(log, code)


@dataclass
class _Progress:
    """Shows the steps of a run while it goes: a bar on a terminal, else a line for each quarter of the run."""

    path: Path
    steps: int
    name: str
    quarter: int = 0
    due_s: float = 0.0

    def update(self) -> None:
        """Show the last step of the log, once a second."""
        if time.monotonic() < self.due_s:
            return
        self.due_s, step, loss = time.monotonic() + 1, 0, ""
        with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            last = json.loads(self.path.read_bytes().splitlines()[-1])
            step, loss = int(last["step"]), f", lm loss {last['lm loss']:.4f}"
        text = f"{self.name}: step {step} of {self.steps}{loss}"
        progress.show(step / self.steps, text)
        if not sys.stderr.isatty() and 4 * step // self.steps > self.quarter:
            self.quarter = 4 * step // self.steps
            say(text)


def _set_aside(folder: Path) -> None:
    """Keep what a run that was broken off, or failed, has left, as unfinished/NAME-1, NAME-2, ..."""
    if folder.exists():
        kept, attempt = folder.parent / "unfinished", 1
        while (kept / f"{folder.name}-{attempt}").exists():
            attempt += 1
        kept.mkdir(exist_ok=True)
        folder.rename(kept / f"{folder.name}-{attempt}")


def _reason(log: Path, code: int) -> str:
    """Return why a run failed: its signal, the first error of its log, its exit code."""
    if not code:
        return "ended with exit code 0, but did not finish"
    number = -code if code < 0 else code - 128  # shells and srun give 128 and the signal
    killed = f"killed by signal {number}: " if number > 0 else ""
    return f"{killed}{first_error(log) or f'no error in {log.name}'} (exit code {code})"


def _record_failure(folder: Path, reason: str) -> None:
    """Write the end.json that a run could not write, whole."""
    line = "".join(letter if letter.isprintable() else " " for letter in reason)[:500]
    content = {"status": "failed", "reason": line, "ended": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    try:
        write_whole(str(folder / "end.json"), json.dumps(content) + "\n", "end.json")
    except UserError as error:
        say(f"WARNING: {error}")

"""Reads directories of runs (--bfpp-run-dir) in whatever state a run left them. Standard library only.

    DIR/run.json     what was run; DIR/steps.jsonl a line per step; DIR/end.json how it ended, absent after a kill
    DIR/trace.json, DIR/timeline.svg    of the traced steps

A defect of a file (cut off, damaged, missing) never raises: it becomes a note of the run, and what is left is read.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..console.errors import UserError

_FORMAT = "megatron_bfpp run 1"
FILES = ("run.json", "steps.jsonl", "end.json")
_ROUND = re.compile(r"[._-]r?(\d{1,6})$")  # breadth-first.2, gpt-52b_breadth-first_r2
_LARGEST_STEP = 2**53  # a damaged number with a hundred digits is no step


@dataclass(frozen=True)
class Step:
    """A line of steps.jsonl. since_start: how many steps of its process came before it; the warm-up counts them."""

    number: int
    since_start: int
    values: dict[str, Any]

    @property
    def time_s(self) -> float | None:
        """Return seconds; None for the first step of a process, which has nothing to count from."""
        value = number(self.values.get("step_time_s"))
        return value if value is not None and value > 0 else None


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a run. header: run.json, {} where it cannot be read. A step that ran twice has the later line."""

    path: Path
    header: dict[str, Any]
    steps: list[Step]
    end: dict[str, Any]
    notes: list[str]

    @cached_property
    def name(self) -> str:
        return text(self.header.get("name")) or text(self.path.name) or "run"

    @cached_property
    def arm(self) -> str:
        return text(self.header.get("arm")) or _ROUND.sub("", self.name)

    @cached_property
    def round(self) -> int | None:
        """Return BFPP_ROUND, else the number at the end of the run's name or of its directory's."""
        for value in (section(self.header, "environment").get("BFPP_ROUND"), self.header.get("round")):
            if re.fullmatch(r"\d{1,6}", str(value), re.ASCII):
                return int(str(value))
        found = _ROUND.search(self.name) or _ROUND.search(self.path.name)
        return int(found[1]) if found else None

    @property
    def is_finished(self) -> bool:
        return self.end.get("status") == "finished"

    @cached_property
    def reason(self) -> str:
        """Say in one line why the run did not finish; empty if it did."""
        if self.is_finished:
            return ""
        if not self.end:
            last = f"after step {self.steps[-1].number}" if self.steps else "before its first step"
            return f"no end.json: killed {last}, or still running"
        status = text(self.end.get("status")) or "unknown"
        return text(self.end.get("reason")) or f"end.json has status {status!r} and no reason"

    @cached_property
    def traced(self) -> set[int]:
        """Return the steps under the recorder."""
        return {step.number for step in self.steps if step.values.get("bubble_fraction_measured") is not None}

    def timed(self, warmup: int) -> list[float]:
        """Return step times in seconds, without the first `warmup` steps of each process of the run.

        Traced steps are left out, and the step after them, in which the trace may still be gathered and written.
        """
        slow = self.traced | {step + 1 for step in self.traced}
        counted = (step for step in self.steps if step.since_start >= warmup and step.number not in slow)
        return [step.time_s for step in counted if step.time_s is not None]


def number(value: Any) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def text(value: Any) -> str:
    """Return one printable line, "" for what is no text: names end up in terminals and pages."""
    if not isinstance(value, str):
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in value).strip()


def section(header: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a map in run.json, {} where it is missing."""
    value = header.get(name)
    return value if isinstance(value, dict) else {}


def load(paths: list[str]) -> list[Run]:
    """Read the runs at `paths`: directories of a run, or directories that hold some. UserError for anything else.

    A directory that is gone, or named like a run (ARM.1) and empty, counts as a run of which nothing is left, if others
    are there: an A/B that lost it is still reported.
    """
    found: list[Path] = []
    gone: list[UserError] = []
    for given in paths:
        path = Path(given)
        try:
            inside, is_dir, exists = _runs_in(path), path.is_dir(), path.exists()
        except (OSError, ValueError) as error:
            raise UserError(f"{given} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        if not inside:
            wrong = f"holds no run: none of {', '.join(FILES)} is there" if is_dir else "is not a directory of a run"
            gone.append(UserError(f"{given} {wrong}.\n  Name the directories that --bfpp-run-dir had."))
            if exists and not (is_dir and _ROUND.search(path.name)):
                raise gone[-1]
        found += inside or [path]
    if len(gone) == len(paths):
        raise gone[0]
    return [read(path) for path in dict.fromkeys(found)]


def _runs_in(path: Path) -> list[Path]:
    if not path.is_dir() or _is_run(path):
        return [path] if path.is_dir() else []
    return sorted(each for each in path.iterdir() if each.is_dir() and _is_run(each))


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in FILES)


def read(path: Path) -> Run:
    """Read the run in one directory."""
    if not _is_run(path):
        lost = "holds no file of a run" if path.exists() else "does not exist"
        return Run(path, {}, [], {"status": "lost", "reason": f"its directory {text(str(path))} {lost}"}, [])
    notes: list[str] = []
    header = _object(path / "run.json", notes, "its configuration is not known")
    form = header.get("format")
    if header and form != _FORMAT:
        found = text(form) or repr(form)[:80]
        notes.append(f"run.json has the format {found}, not {_FORMAT}: its names may mean something else")
    steps = _steps(path / "steps.jsonl", notes)
    end = _object(path / "end.json", notes, "") if (path / "end.json").exists() else {}
    count = number(end.get("steps"))
    if count is not None and end.get("status") == "finished" and count > len(steps):
        notes.append(f"end.json counts {count:g} steps, steps.jsonl has {len(steps)}")
    return Run(path, header, steps, end, notes)


def _content(path: Path, notes: list[str], loss: str) -> str | None:
    """Return a file's text; None, and add a note, where it cannot be read."""
    try:
        if not path.is_file():
            raise FileNotFoundError(None, "there is none")
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}" + (f"; {loss}" if loss else ""))
        return None


def _parse(content: str) -> dict[str, Any] | None:
    """Return a JSON object, without halves of surrogate pairs, which nothing can print; None for anything else."""
    try:
        value = json.loads(content)
        if "\\u" in content:
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _object(path: Path, notes: list[str], loss: str) -> dict[str, Any]:
    content = _content(path, notes, loss)
    value = {} if content is None else _parse(content)
    if value is None:
        notes.append(f"{path.name} is not a whole JSON object" + (f": {loss}" if loss else ""))
    return value or {}


def _steps(path: Path, notes: list[str]) -> list[Step]:
    content = _content(path, notes, "it has no steps")
    steps: dict[int, Step] = {}
    previous, since_start, again = None, 0, 0
    bad: list[int] = []
    lines = (content or "").split("\n")
    for place, line in enumerate(lines, 1):
        values = _parse(line) or {}
        step = values.get("step")
        if type(step) is not int or not 0 <= step < _LARGEST_STEP:
            bad += [place] if line.strip() else []
            continue
        # Another process goes on from an earlier step, or has no time for its first one.
        is_first = previous is not None and (step <= previous or values.get("step_time_s", 0) is None)
        since_start = 0 if is_first else since_start + (previous is not None)
        again += step in steps
        steps[step], previous = Step(step, since_start, values), step
    if bad and bad[-1] == len(lines):  # no line end: it was being written
        notes.append(f"the last line of {path.name} is cut off: skipped")
        bad.pop()
    if bad:
        notes.append(f"{len(bad)} lines of {path.name} are no steps, line {bad[0]} first: skipped")
    if again:
        notes.append(f"{again} steps were run again after a restart: the later ones count")
    return [steps[step] for step in sorted(steps)]

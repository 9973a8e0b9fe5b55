"""bfpp doctor --gpu-trial: ten minutes on the GPUs of a node, and a line of verdict for each row of rows.py.

    srun --nodes 1 --ntasks 1 --gpus 8 bfpp doctor --gpu-trial --json trial.json

Without a GPU the rows that can run on the CPU do, and the others say what they need.
"""

import argparse
import json
import shutil
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...console import progress
from ...console.files import write_wanted
from ...console.version import __version__
from .. import facts as doctor_facts
from ..line import gpus, section
from .place import JobFailed, Place
from .rows import ROWS, Row

FORMAT = "megatron_bfpp gpu trial 1"
OK, FAIL, NOT_RUN, NOT_JUDGED = "ok", "fail", "not run", "not judged"
INCOMPLETE = 4  # the exit code where nothing failed, but rows were not run or not judged
_START = "{:<3}{:<12}{:<41}"


class Judged(NamedTuple):
    """A row of the table. data: all that was measured; None where nothing was."""

    number: int
    title: str
    status: str
    figures: str
    seconds: float
    data: Any = None


def run(args: argparse.Namespace) -> int:
    """Run the trial; print a line per row, and return the exit code."""
    lines: list[Judged] = []
    facts = doctor_facts.gather(lambda part: progress.show(0.0, f"looking at {part}"))
    folder = Path(tempfile.mkdtemp(prefix="bfpp-trial-"))
    place = Place(len(gpus(facts)), bool(section(facts, "te").get("version")), facts, folder)
    print(f"megatron_bfpp {__version__}: GPU trial on {_where(place)}", flush=True)
    try:
        for number, row in enumerate(ROWS):
            place.on_wait = partial(_show, number, row.title, time.monotonic())
            lines.append(_judged(number, row, place, lines))
            progress.clear()
            print(shown(lines[-1]), flush=True)
        print(summary(lines, folder))
    finally:  # also of a trial that SLURM ends: the rows so far
        progress.clear()
        rows = [each._asdict() for each in lines]
        content = {"format": FORMAT, "version": __version__, "facts": facts, "rows": rows}
        write_wanted(args, json=lambda: json.dumps(content) + "\n")  # thousands of kernels: no line for each number
        if len(lines) == len(ROWS) and not any(line.status == FAIL for line in lines):
            shutil.rmtree(folder, ignore_errors=True)
    return exit_code(lines)


def _where(place: Place) -> str:
    if place.shares_card:
        return "one GPU, which two ranks share: times mean nothing there"
    return f"{place.gpus} GPUs" if place.gpus else "a CPU: rows that need a GPU are not run"


def _judged(number: int, row: Row, place: Place, before: list[Judged]) -> Judged:
    started = time.monotonic()
    if row.gpus and not place.gpus:
        return Judged(number, row.title, NOT_RUN, f"needs {row.gpus} GPU{'s' * (row.gpus > 1)}", 0.0)
    if before and before[0].status == FAIL:
        return Judged(number, row.title, NOT_RUN, "row 0 failed", 0.0)
    data = None
    try:
        data = row.run(place)
        wrong, figures = row.judge(data)
    except JobFailed as error:
        wrong, figures = [str(error)], ""
        if place.shares_card and _one_rank_per_gpu(place.folder):
            return Judged(number, row.title, NOT_RUN, "this NCCL runs one rank per GPU: needs 2 GPUs", 0.0)
    status = FAIL if wrong else OK
    if row.times and place.shares_card and data is not None:
        status, wrong = NOT_JUDGED, []
    return Judged(number, row.title, status, "; ".join(wrong) or figures, time.monotonic() - started, data)


def _one_rank_per_gpu(folder: Path) -> bool:
    return any("Duplicate GPU" in log.read_text(encoding="utf-8", errors="replace") for log in folder.rglob("*.log"))


def _show(number: int, title: str, started: float) -> None:
    progress.show(number / len(ROWS), f"row {number}, {title}: {time.monotonic() - started:.0f} s")


def shown(line: Judged) -> str:
    """Return the line of a row, wrapped where its figures are long."""
    start = _START.format(line.number, line.status, line.title)
    return "\n".join(textwrap.wrap(line.figures, 120, initial_indent=start, subsequent_indent=" " * len(start)))


def summary(lines: list[Judged], folder: Path) -> str:
    """Count the rows by status; where one failed, name the folder of its logs."""
    counts = {status: sum(line.status == status for line in lines) for status in (OK, FAIL, NOT_RUN, NOT_JUDGED)}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    seconds = sum(line.seconds for line in lines)
    return f"{text}; {seconds:.0f} s" + (f"; the logs are in {folder}" if counts[FAIL] else "")


def exit_code(lines: list[Judged]) -> int:
    """Return 0 if all rows are good, 1 if one failed, else INCOMPLETE."""
    if any(line.status == FAIL for line in lines):
        return 1
    return 0 if all(line.status == OK for line in lines) else INCOMPLETE

"""Text forms of a schedule: one line of actions per rank, and the CSV that torch.distributed.pipelining loads.

Both are strings in, strings out; whoever has the path writes the file.
"""

from __future__ import annotations

import csv
import hashlib
import io

from .ir import Action, Schedule


def to_text(schedule: Schedule) -> str:
    """One line per rank: `0F0 0SEND_F0 0F1 ...`."""
    return "".join(" ".join(map(str, actions)) + "\n" for actions in schedule)


def from_text(text: str) -> Schedule:
    """The schedule that `to_text` printed; ValueError names the line and the word that is no action."""
    return [[_parse(word, line) for word in row.split()] for line, row in enumerate(text.splitlines(), 1)]


def to_csv(schedule: Schedule) -> str:
    """One row per rank, one action per cell: loads in torch's _PipelineScheduleRuntime._load_csv.

    An order loads with format "compute_only", a lowered plan with "compute_comms".
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([str(action) for action in actions] for actions in schedule)
    return buffer.getvalue()


def from_csv(text: str) -> Schedule:
    """The schedule of a CSV; empty cells (torch's idle slots) are skipped."""
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"not a CSV: {error}") from None
    return [[_parse(cell, line) for cell in row if cell.strip()] for line, row in enumerate(rows, 1)]


def digest(schedule: Schedule) -> str:
    """12 hexadecimal digits that two ranks can compare to know that they run the same plan."""
    return hashlib.sha256(to_text(schedule).encode()).hexdigest()[:12]


def _parse(word: str, line: int) -> Action:
    try:
        return Action.parse(word)
    except ValueError as error:
        raise ValueError(f"line {line} (pp_rank {line - 1}): {error}") from None

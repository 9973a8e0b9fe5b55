"""Files of a schedule: text, one line of actions per rank, and the CSV that torch.distributed.pipelining loads.

All but `read` are strings in, strings out; whoever has the path writes the file.
"""

import csv
import hashlib
import io
import sys

from ..console.errors import UserError
from .ir import COMPUTE, Action, PipelineShape, Schedule


def to_text(schedule: Schedule) -> str:
    """Return one line per rank: `0F0 0SEND_F0 0F1 ...`."""
    return "".join(" ".join(map(str, actions)) + "\n" for actions in schedule)


def from_text(text: str) -> Schedule:
    """Return the schedule that `to_text` printed; UserError names the line and the word that is no action."""
    return [[_parse(word, line) for word in row.split()] for line, row in enumerate(text.splitlines(), 1)]


def to_csv(schedule: Schedule) -> str:
    """Return one row per rank, one action per cell: loads in torch's _PipelineScheduleRuntime._load_csv.

    An order loads with format "compute_only", a lowered plan with "compute_comms".
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(str, actions) for actions in schedule)
    return buffer.getvalue()


def from_csv(text: str) -> Schedule:
    """Return the schedule of a CSV, without its empty cells (torch's idle slots); UserError names line and word."""
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise UserError(f"not a CSV: {error}") from None
    return [[_parse(cell, line) for cell in row if cell.strip()] for line, row in enumerate(rows, 1)]


def digest(schedule: Schedule) -> str:
    """Return 12 hexadecimal digits that two ranks can compare to know that they run the same plan."""
    return hashlib.sha256(to_text(schedule).encode()).hexdigest()[:12]


def read(path: str) -> Schedule:
    """Read an order or a plan from a CSV or a text, - for standard input.

    Raises UserError for a file that cannot be read, is neither, or holds no forward or backward.
    """
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}.") from None
    text = text.rstrip() + "\n"  # an empty line at the end is no rank
    try:
        plan = (from_csv if "," in text else from_text)(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not any(action.op in COMPUTE for actions in plan for action in actions):
        raise UserError(f"{path} holds no forward or backward.\n  Write one with: bfpp show ... --plan --csv FILE")
    return plan


def shape_of(plan: Schedule, pp: int | None, chunks: int | None, microbatches: int | None, path: str) -> PipelineShape:
    """Return the shape that the user gave, completed by the numbers in the file."""
    actions = [action for rank in plan for action in rank if action.op in COMPUTE]
    size = len(plan) if pp is None else pp
    if microbatches is None:
        microbatches = 1 + max(action.microbatch or 0 for action in actions)
    if chunks is None:
        chunks = -(-(1 + max(action.stage for action in actions)) // max(1, size))
    shape = PipelineShape(size, chunks, microbatches)
    if shape.num_stages * microbatches > 2 * len(actions) + 1000:
        # One damaged number; listing all that is missing would take for ever.
        raise UserError(
            f"{path}: {len(actions)} forwards and backwards are too few for {title(shape)}.\n"
            "  Name the shape that is meant: --pp, --chunks, --microbatches."
        )
    return shape


def title(shape: PipelineShape) -> str:
    return f"PP {shape.pp_size} x {shape.num_chunks} chunks, {shape.num_microbatches} micro-batches"


def _parse(word: str, line: int) -> Action:
    try:
        return Action.parse(word)
    except ValueError as error:
        raise UserError(f"line {line} (pp_rank {line - 1}): {error}") from None

"""Reads the file of an order or a plan, and the shape that its numbers say. Standard library only."""

from __future__ import annotations

import sys

from ..console.errors import UserError
from . import PipelineShape, Schedule, formats
from .ir import COMPUTE

__all__ = ["read", "shape_of", "title"]


def read(path: str) -> Schedule:
    """Of a CSV or of text, - for standard input. UserError for what is neither, or holds no forward or backward."""
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                text = file.read()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}.") from None
    text = text.rstrip() + "\n"  # an empty line at the end is no rank
    try:
        plan = (formats.from_csv if "," in text else formats.from_text)(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not any(action.op in COMPUTE for actions in plan for action in actions):
        raise UserError(f"{path} holds no forward or backward.\n  Write one with: bfpp show ... --plan --csv FILE")
    return plan


def shape_of(plan: Schedule, pp: int | None, chunks: int | None, microbatches: int | None, path: str) -> PipelineShape:
    """The shape that the user gave, completed by what the file's numbers say."""
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

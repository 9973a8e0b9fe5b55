"""The table of bfpp doctor, from the facts of a machine. Standard library only; nothing is looked at here."""

from __future__ import annotations

import textwrap
from typing import Any

from .environment import environment_lines
from .line import FAIL, WARN, Line
from .software import software_lines

WIDTH, MARGIN = 120, 33  # letters; CUDA_DEVICE_MAX_CONNECTIONS is the longest common name


def judged(facts: dict[str, Any]) -> list[Line]:
    """Every rule on the facts of `doctor_facts.gather`."""
    return [*software_lines(facts), *environment_lines(facts)]


def table(lines: list[Line]) -> str:
    """A line per thing; what would be right stands below it."""
    rows = []
    indent = " " * (MARGIN + 6)
    for line in lines:
        # Long names of variables and folders are not broken: they are copied.
        rows += textwrap.wrap(
            line.found, WIDTH, initial_indent=f"{line.status:<6}{line.name:<{MARGIN}}", subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        ) or [f"{line.status:<6}{line.name}"]  # fmt: skip
        if line.advice:
            rows += textwrap.wrap(
                line.advice, WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(rows)


def summary(lines: list[Line]) -> str:
    failed, warned = ([line.name for line in lines if line.status == status] for status in (FAIL, WARN))
    if failed:
        return f"{len(failed)} of {len(lines)} fail: {', '.join(failed)}"
    return f"nothing fails; {len(warned)} of {len(lines)} with a warning" if warned else "all is well"

"""The table of bfpp doctor, made from the facts of a machine alone. Standard library only."""

import textwrap
from functools import partial

from .environment import environment_lines
from .line import FAIL, WARN, Facts, Line
from .seams import seam_lines
from .software import software_lines

WIDTH, MARGIN = 120, 33  # letters; CUDA_DEVICE_MAX_CONNECTIONS is the longest common name


def judged(facts: Facts) -> list[Line]:
    """Apply every rule to the facts that `facts.gather` returned."""
    return [*software_lines(facts), *environment_lines(facts), *seam_lines(facts)]


def table(lines: list[Line]) -> str:
    """Return a line per thing, with its advice below it. Names are not broken: they are copied."""
    wrap = partial(textwrap.wrap, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    rows, indent = [], " " * (MARGIN + 6)
    for line in lines:
        start = f"{line.status:<6}{line.name:<{MARGIN - 1}} "
        rows += wrap(line.found, initial_indent=start, subsequent_indent=indent) or [start.rstrip()]
        rows += wrap(line.advice, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
    return "\n".join(rows)


def summary(lines: list[Line]) -> str:
    """Name the lines that fail, or count the warnings."""
    failed, warned = ([line.name for line in lines if line.status == status] for status in (FAIL, WARN))
    if failed:
        return f"{len(failed)} of {len(lines)} fail: {', '.join(failed)}"
    return f"nothing fails; {len(warned)} of {len(lines)} with a warning" if warned else "all is well"

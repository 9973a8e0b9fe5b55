"""The table of all that the plugin relies on in Megatron and torch, and the check that it is there.

A release is not refused for its number. Where a seam does not fit, the line names it, the release and what changed.
"""

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from ...console.errors import UserError
from ..seams import Seam, SeamError
from .cpu import CPU
from .entry_point import ENTRY_POINT
from .hybrid import HYBRID_ENTRY_POINT, HYBRID_ON_CPU
from .rows import Part
from .step import DEFERRED, GRAPHS, HYBRID, LOOP, PLACEMENT, PLAN, STEP
from .training import COMMAND_LINE, LOGS, SHARDED, TRACES

__all__ = [
    "COMMAND_LINE", "CPU", "DEFERRED", "ENTRY_POINT", "GRAPHS", "HYBRID", "HYBRID_ENTRY_POINT",
    "HYBRID_ON_CPU", "LOGS", "LOOP", "PARTS", "PLACEMENT", "PLAN",
    "SHARDED", "STEP", "TRACES", "Answer", "Part", "answers", "check", "check_release", "is_tested", "remedy",
    "strange_release",
]  # fmt: skip

PARTS = (
    STEP, PLAN, LOOP, PLACEMENT, HYBRID, COMMAND_LINE, LOGS, TRACES, DEFERRED, SHARDED, GRAPHS, CPU, ENTRY_POINT,
    HYBRID_ON_CPU, HYBRID_ENTRY_POINT,
)  # fmt: skip
FIRST, LAST = (0, 17), (0, 19)  # releases of megatron-core with megatron.training; those between are tested
TESTED = " to ".join(".".join(map(str, each)) for each in (FIRST, LAST))
INSTALL = f"pip install --no-deps 'megatron-core>={FIRST[0]}.{FIRST[1]}', or run from a Megatron-LM checkout"

_checked: set[Part] = set()  # in this process: what the plugin has changed since is its own
_said: set[str] = set()  # releases that were named in this process


class Answer(NamedTuple):
    """What was found at a seam: `misfit` is None where all is as the plugin needs it."""

    part: Part
    seam: Seam
    misfit: str | None


def release() -> str:
    """Return the version of megatron-core that is imported here, without the commit of the folder around it."""
    from megatron.core.package_info import __version__

    return str(__version__).partition("+")[0]


def check_release() -> None:
    """Raise UserError without Megatron, and for a release that is too old."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise UserError(f"megatron.core is not installed.\n  {INSTALL}.")
    if _number(release()) < FIRST:
        first = ".".join(map(str, FIRST))
        raise UserError(f"megatron-core {release()} is not supported: megatron_bfpp works with {first} and newer.")


def is_tested() -> bool:
    """Return whether this release is one of those that the plugin is tested with."""
    return FIRST <= _number(release()) <= LAST


def check(*parts: Part) -> None:
    """Raise SeamError, a line that names the first seam that does not fit. Parts that fitted before are passed over."""
    for part in parts:
        if part in _checked:
            continue
        wrong = [(seam, reason) for seam in part.seams if (reason := seam.misfit()) is not None]
        if wrong:
            raise SeamError(_line(part, *wrong[0], len(wrong) - 1))
        _checked.add(part)


def forget() -> None:
    """Let `check` look at everything again."""
    _checked.clear()
    _said.clear()


def strange_release() -> list[str]:
    """Return a line, once, about a release that is not tested, in which all seams fit that were checked."""
    if is_tested() or release() in _said:
        return []
    _said.add(release())
    count = sum(len(part.seams) for part in _checked)
    return [f"megatron-core {release()} is not one of the tested releases ({TESTED}); all {count} seams fit"]


def answers() -> Iterator[Answer]:
    """Yield the answer of every seam, those of flags that nobody has asked for included."""
    for part in PARTS:
        for seam in part.seams:
            yield Answer(part, seam, seam.misfit())


def _line(part: Part, seam: Seam, reason: str, more: int) -> str:
    import torch

    what = f"torch {torch.__version__}" if seam.module.startswith("torch") else f"megatron-core {release()}"
    also = f" ({more} more: bfpp doctor lists them)" if more else ""
    return f"{what} does not fit: {reason}; {seam.why}{also}. Use {remedy(part, seam)}."


def remedy(part: Part, seam: Seam) -> str:
    """Return what to use where this seam does not fit."""
    is_torchs = seam.module.startswith("torch")
    tested = f"a torch from {part.first_torch} to 2.15" if is_torchs else f"a tested release of Megatron ({TESTED})"
    return f"{tested}, or {part.instead}" if part.instead else tested


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])

"""One line of bfpp doctor's table."""

from typing import Any, NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"
Facts = dict[str, Any]


class Line(NamedTuple):
    """One line: the thing, its status, its state, and the advice: what would be right, and whose rule that is."""

    name: str
    status: str
    found: str
    advice: str = ""


def ok(name: str, found: str, advice: str = "") -> Line:
    """Make a line of which nothing is wrong."""
    return Line(name, OK, found, advice)


def warn(name: str, found: str, advice: str) -> Line:
    """Make a line that may cost time or results."""
    return Line(name, WARN, found, advice)


def fail(name: str, found: str, advice: str) -> Line:
    """Make a line with which jobs do not run."""
    return Line(name, FAIL, found, advice)


def section(facts: Facts, name: str) -> Facts:
    """Return a part of the facts; {} where it is missing."""
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def gpus(facts: Facts) -> list[Facts]:
    """Return the GPUs that torch sees."""
    return section(facts, "torch").get("devices", [])  # type: ignore[no-any-return]


def has_gpus(facts: Facts) -> bool:
    """Return whether rules of GPUs apply: torch sees one, or at least the driver does."""
    return bool(gpus(facts) or section(facts, "nvidia_smi").get("gpus"))

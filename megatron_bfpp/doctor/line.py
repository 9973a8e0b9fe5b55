"""One line of bfpp doctor's table."""

from __future__ import annotations

from typing import Any, NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Line(NamedTuple):
    """advice: what would be right, with whose rule it is; empty where nothing is to be said."""

    name: str
    status: str
    found: str
    advice: str = ""


def section(facts: dict[str, Any], name: str) -> dict[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def has_gpus(facts: dict[str, Any]) -> bool:
    """A machine with GPUs, seen by torch or only by the driver: rules of GPUs apply to it."""
    return bool(section(facts, "torch").get("devices") or section(facts, "nvidia_smi").get("gpus"))

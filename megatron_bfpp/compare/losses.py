"""Whether runs computed the same bits: losses and gradient norms of common steps. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .runs import Run, number

GRADIENT_NORM = "grad norm"
_HEX = " hex"


@dataclass(frozen=True)
class Difference:
    """Of one value between two runs."""

    name: str
    first_step: int
    largest: float  # |a - b| / max(|a|, |b|); infinite where one of them is not a number
    largest_step: int


@dataclass(frozen=True)
class Match:
    """A run against the reference run. `losses` is None where no loss differs, `gradient_norm` likewise."""

    run: str
    steps: int  # that both have
    losses: Difference | None
    gradient_norm: Difference | None
    all_bits: bool  # False where some value had no hex field: it is compared as it was written
    names: tuple[str, ...]  # what was compared
    unmatched: tuple[str, ...]  # what only one of the two has

    @property
    def is_comparable(self) -> bool:
        return self.steps > 0 and any(name != GRADIENT_NORM for name in self.names)


def match(reference: Run, run: Run) -> Match:
    ours, theirs = ({step.number: step.values for step in each.steps} for each in (run, reference))
    common = sorted(ours.keys() & theirs.keys())
    names: dict[str, None] = {}
    unmatched: dict[str, None] = {}
    all_bits = True
    found: dict[str, Difference] = {}
    for step in common:
        one, two = ours[step], theirs[step]
        for name in _names(one) | _names(two):
            values = [(_bits(each, name), _value(each, name)) for each in (two, one)]
            if any(bits is None and value is None for bits, value in values):
                unmatched[name] = None
                continue
            names[name] = None
            (bits, value), (other_bits, other) = values
            if bits is None or other_bits is None:
                all_bits, is_same = False, value == other and value is not None
            else:
                is_same = bits == other_bits
            if not is_same:
                found[name] = _wider(found.get(name), name, step, relative(value, other))
    losses = [found[name] for name in found if name != GRADIENT_NORM]
    return Match(
        run.name, len(common), _worst(losses), found.get(GRADIENT_NORM), all_bits, tuple(names), tuple(unmatched)
    )


def relative(one: float | None, two: float | None) -> float:
    """|one - two| / max(|one|, |two|), infinite where one of them is unknown or not a number."""
    if one is None or two is None:
        return float("inf")
    scale = max(abs(one), abs(two))
    return abs(one / scale - two / scale) if scale else 0.0


def _names(values: dict[str, Any]) -> set[str]:
    return {name.removesuffix(_HEX) for name in values if name.endswith((_HEX, "loss")) or name == GRADIENT_NORM}


def _bits(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name + _HEX)
    return value if isinstance(value, str) else None


def _value(values: dict[str, Any], name: str) -> float | None:
    try:
        return number(float.fromhex(_bits(values, name) or ""))
    except (ValueError, OverflowError):
        return number(values.get(name))


def _wider(before: Difference | None, name: str, step: int, size: float) -> Difference:
    if before is None:
        return Difference(name, step, size, step)
    return before if size <= before.largest else Difference(name, before.first_step, size, step)


def _worst(differences: list[Difference]) -> Difference | None:
    """The largest, with the first step at which any of them differed."""
    if not differences:
        return None
    largest = max(differences, key=lambda each: each.largest)
    return Difference(largest.name, min(each.first_step for each in differences), largest.largest, largest.largest_step)

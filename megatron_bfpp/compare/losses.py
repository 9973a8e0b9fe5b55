"""Compares the losses and gradient norms of two runs bit by bit. Standard library only."""

from dataclasses import dataclass, replace
from typing import Any

from .runs import Run, number

GRADIENT_NORM = "grad norm"
_HEX = " hex"


@dataclass(frozen=True)
class Difference:
    """How one value differs between two runs."""

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
    """Compare every loss and gradient norm of the steps that both runs have."""
    ours, theirs = ({step.number: step.values for step in each.steps} for each in (run, reference))
    common = sorted(ours.keys() & theirs.keys())
    names: dict[str, None] = {}
    unmatched: dict[str, None] = {}
    found: dict[str, Difference] = {}
    all_bits = True
    for step in common:
        one, two = ours[step], theirs[step]
        for name in _names(one) | _names(two):
            (bits, value), (other_bits, other) = _value(one, name), _value(two, name)
            if (bits is None and value is None) or (other_bits is None and other is None):
                unmatched[name] = None
                continue
            names[name] = None
            has_bits = bits is not None and other_bits is not None
            all_bits &= has_bits
            if bits != other_bits if has_bits else value != other or value is None:
                size = relative(value, other)
                before = found.setdefault(name, Difference(name, step, size, step))
                if size > before.largest:
                    found[name] = replace(before, largest=size, largest_step=step)
    losses = [found[name] for name in found if name != GRADIENT_NORM]
    norm = found.get(GRADIENT_NORM)
    return Match(run.name, len(common), _worst(losses), norm, all_bits, tuple(names), tuple(unmatched))


def relative(one: float | None, two: float | None) -> float:
    """Return |one - two| / max(|one|, |two|), infinite where one of them is unknown or not a number."""
    if one is None or two is None:
        return float("inf")
    scale = max(abs(one), abs(two))
    return abs(one / scale - two / scale) if scale else 0.0


def _names(values: dict[str, Any]) -> set[str]:
    return {name.removesuffix(_HEX) for name in values if name.endswith((_HEX, "loss")) or name == GRADIENT_NORM}


def _value(values: dict[str, Any], name: str) -> tuple[str | None, float | None]:
    """Return all bits of a value and its number, None for what is not there."""
    bits = values.get(name + _HEX)
    bits = bits if isinstance(bits, str) else None
    try:
        return bits, number(float.fromhex(bits or ""))
    except (ValueError, OverflowError):
        return bits, number(values.get(name))


def _worst(differences: list[Difference]) -> Difference | None:
    """Return the largest, with the first step at which any of them differed."""
    if not differences:
        return None
    first = min(each.first_step for each in differences)
    return replace(max(differences, key=lambda each: each.largest), first_step=first)

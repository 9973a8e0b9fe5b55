"""Which layers are of which kind: --moe-layer-freq, --linear-attention-freq, --hybrid-layer-pattern."""

import re
from typing import NamedTuple

from ...console.errors import UserError

__all__ = ["Hybrid", "hybrid_of", "marked"]

_TERM = re.compile(r"\[([01](?:[,\s]+[01])*)\](?:\*(\d+))?")
_MOST = 100_000  # layers


def marked(flag: str, text: str, num_layers: int, periodic_is_last: bool) -> tuple[int, ...]:
    """Return 1 for each layer of the kind, 0 for each other. text: a number, or a Python list of 0 and 1.

    A number n marks every n-th layer, from the first on (--moe-layer-freq); or, if periodic_is_last, all but every
    n-th (--linear-attention-freq). Raises UserError for another text, or for a list of another length.
    """
    plain = re.sub(r"\s", "", text).strip("()")
    if plain.isascii() and plain.isdigit() and 0 < int(plain) <= _MOST:
        every = int(plain)
        if periodic_is_last:
            return tuple(int((layer + 1) % every != 0) for layer in range(num_layers))
        return tuple(int(layer % every == 0) for layer in range(num_layers))
    found: list[int] = []
    for term in plain.split("+"):
        match = _TERM.fullmatch(term)
        if match is None or len(match[2] or "") > 6:
            raise UserError(f"{flag} {text} is neither a number nor a list such as ([0]*3+[1]*11).")
        found += [int(digit) for digit in match[1].split(",")] * int(match[2] or 1)
    if len(found) != num_layers:
        raise UserError(f"{flag} {text} names {len(found)} layers, and the model has {num_layers}.\n"
                        f"  Change {flag} or --num-layers.")  # fmt: skip
    return tuple(found)


class Hybrid(NamedTuple):
    """A hybrid model's layers: each stage's, and those of one layer of multi-token prediction."""

    stages: list[str]
    mtp: str
    mtp_layers: int


def hybrid_of(text: str) -> Hybrid:
    """Read a pattern such as M-M*|M-ME/*E/*E. Raises UserError for a layer that is not known."""
    main, *predictions = text.split("/")
    stages = main.split("|")
    for symbol in main.replace("|", "") + "".join(predictions):
        if symbol not in "MG*-E":
            raise UserError(f"--hybrid-layer-pattern {text} has a layer {symbol!r}, which bfpp plan does not know.\n"
                            "  It knows M, G, *, - and E.")  # fmt: skip
    if len(set(predictions)) > 1:
        raise UserError(f"--hybrid-layer-pattern {text} has predictions that differ; all must be alike.")
    if not main.replace("|", ""):
        raise UserError(f"--hybrid-layer-pattern {text} has no layers.")
    return Hybrid(stages, predictions[0] if predictions else "", len(predictions))

"""How the rows of the table are written: what the plugin calls, wraps, replaces or reads, and what for."""

from dataclasses import dataclass
from typing import Any

from ..seams import Seam
from .known import known


@dataclass(frozen=True)
class Part:
    """Seams that are needed together: by every breadth-first step, or with a flag.

    name: of what needs them, for bfpp doctor. instead: what to do without them, beside using a tested release; ""
    where every job needs them. first_torch: the first release of torch in which those of torch fit.
    """

    name: str
    instead: str
    seams: tuple[Seam, ...]
    first_torch: str = "2.9"

    @property
    def is_core(self) -> bool:
        """Return whether Megatron-Core is enough, without megatron.training."""
        return not any(seam.module.startswith("megatron.training") for seam in self.seams)


def called(module: str, name: str, parameters: str, why: str, **more: Any) -> Seam:
    """Rely on a function that the plugin calls with these parameters: it may have further ones with defaults."""
    return Seam(module, name, why, tuple(parameters.split()), others="optional", **more)


def wrapped(module: str, name: str, parameters: str, why: str, **more: Any) -> Seam:
    """Rely on a function around which the plugin does something: it is called on with whatever it is given."""
    return Seam(module, name, why, tuple(parameters.split()), **more)


def replaced(module: str, name: str, parameters: str, why: str, **more: Any) -> Seam:
    """Rely on a function that the plugin takes the place of: it has these parameters alone."""
    return Seam(module, name, why, tuple(parameters.split()), others="none", **more)


def redone(module: str, name: str, parameters: str, why: str) -> Seam:
    """Rely on a function whose work the plugin does itself: its code reads what that of a tested release reads."""
    return Seam(module, name, why, tuple(parameters.split()), others="none", known=known(module, name))


def there(module: str, name: str, why: str, reads: str = "", **more: Any) -> Seam:
    """Rely on a module, a class or a value that is there; `reads`: names that its code must have."""
    return Seam(module, name, why, reads=tuple(reads.split()), **more)

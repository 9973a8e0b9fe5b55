"""The one way in which this plugin changes Megatron and torch: checked before use, idempotent, undone in one place.

Three kinds of change:
  - `apply`: a function of Megatron that the plugin replaces wherever it is bound, until `undo`;
  - `together`: attributes of any objects, replaced under one name, until `undo`;
  - `changed`: attributes of one object, for the time of a `with` block.
`undo_all` takes back everything that `apply` and `together` did.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any


class SeamError(RuntimeError):
    """This Megatron is not the one the plugin was written for."""


@dataclass(frozen=True)
class Seam:
    """One function of Megatron, and the parameters the replacement relies on."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def current(self) -> Callable[..., Any]:
        """Return the function that is bound there now; SeamError unless it is one with these parameters."""
        function = getattr(importlib.import_module(self.module), self.name, None)
        if function is None:
            raise SeamError(f"{self.module}.{self.name} does not exist in this Megatron")
        missing = set(self.parameters) - set(inspect.signature(function).parameters)
        if missing:
            raise SeamError(f"{self.module}.{self.name} has no parameter {', '.join(sorted(missing))}")
        return function  # type: ignore[no-any-return]


_MISSING = object()
_undo: dict[Hashable, Callable[[], object]] = {}  # seam or name -> how to undo it, in the order of their application


def is_applied(key: Hashable) -> bool:
    """Return whether this seam, or the changes of this name, are in effect."""
    return key in _undo


def apply(seam: Seam, around: Callable[..., Any]) -> None:
    """Let around(original, ...) run wherever the original is bound; do nothing if the seam is applied already.

    Modules that imported the function by name (`from ... import`) keep a binding of their own, hence the search.
    """
    if seam not in _undo:
        original = seam.current()

        @wraps(original)  # tools that look at the function see Megatron's signature
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        _rebind(seam.name, original, replacement)
        _undo[seam] = partial(_rebind, seam.name, replacement, original)


@contextmanager
def together(key: Hashable) -> Iterator[ExitStack]:
    """Collect changes under a name: undone at once if one of them fails, else by undo(key), the last one first.

    The stack is for `put`, and for callbacks that undo other effects.
    """
    with ExitStack() as stack:
        yield stack
        _undo[key] = stack.pop_all().close


def put(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set owner.name to value until the stack is closed. An inherited attribute is then inherited again."""
    # Slots, such as a function's __code__, stand in no dictionary.
    is_slot = hasattr(getattr(type(owner), name, None), "__set__")
    previous = getattr(owner, name) if is_slot else vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    stack.callback(*((delattr, owner, name) if previous is _MISSING else (setattr, owner, name, previous)))


@contextmanager
def changed(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of `owner` for a while; they are restored also after an error."""
    with ExitStack() as stack:
        for name, value in values.items():
            put(stack, owner, name, value)
        yield


def undo(key: Hashable) -> None:
    """Undo a seam, or the changes of a name; do nothing if it is not applied."""
    if key in _undo:
        _undo.pop(key)()


def undo_all() -> None:
    """Undo every seam and every change that was made together, the last one first."""
    for key in reversed(list(_undo)):
        undo(key)


def _rebind(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        # vars, not getattr: lazy modules import what they are asked for.
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)

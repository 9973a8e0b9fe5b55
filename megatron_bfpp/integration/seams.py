"""Seams: the functions of Megatron that this plugin replaces, as data. Checked before use, undoable, idempotent."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        """What is bound there now; SeamError unless it is a function with the parameters."""
        function = getattr(importlib.import_module(self.module), self.name, None)
        if function is None:
            raise SeamError(f"{self.module}.{self.name} does not exist in this Megatron")
        missing = set(self.parameters) - set(inspect.signature(function).parameters)
        if missing:
            raise SeamError(f"{self.module}.{self.name} has no parameter {', '.join(sorted(missing))}")
        return function  # type: ignore[no-any-return]


_applied: dict[Seam, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # seam -> (original, replacement)


def apply(seam: Seam, replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Bind replace(original) wherever the original is bound; nothing if the seam is applied already.

    Modules that imported the name keep their own binding of it (`from ... import`), hence the search.
    """
    if seam in _applied:
        return
    original = seam.current()
    replacement = replace(original)
    _rebind(seam.name, original, replacement)
    _applied[seam] = original, replacement


def undo(seam: Seam) -> None:
    """Bind the original again wherever the replacement is bound; nothing if the seam is not applied."""
    if seam in _applied:
        original, replacement = _applied.pop(seam)
        _rebind(seam.name, replacement, original)


def undo_all() -> None:
    for seam in reversed(list(_applied)):  # of two around one function the outer one first
        undo(seam)


def _rebind(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        # vars, not getattr: lazy modules import what they are asked for.
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


@contextmanager
def changed(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of `owner` set for a while, and restored also after an error."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)

"""Damage what the plugin relies on, one place at a time: renamed, moved, with other parameters, with another body."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from types import SimpleNamespace

from megatron_bfpp.integration.seams import Seam, names_read

Patch = Callable[[object, str, object], None]  # sets an attribute, as monkeypatch.setattr


def kinds(seam: Seam) -> Iterator[str]:
    """Yield the damages that this seam must see."""
    yield "moved module"
    if seam.name and not seam.name.endswith(("__init__", "__new__")):  # else the parent's is found
        yield "renamed"
    if seam.parameters:
        yield "lost parameter"
    if seam.others != "any":
        yield "new parameter"
    if seam.reads or seam.known:
        yield "other body"


def damage(seam: Seam, kind: str, patch: Patch) -> str:
    """Do it, and return what the line about it must say: of a module its name, since other rows hold it too."""
    modules = []
    for each in (seam.module, *seam.also_in):
        with suppress(ModuleNotFoundError):  # it stood elsewhere in other releases
            modules.append(importlib.import_module(each))
    modules = [each for each in modules if not seam.name or hasattr(each, seam.name.split(".")[0])]
    nowhere = f"{seam.name} is neither in {seam.module} nor in {seam.also_in[0]}" if seam.also_in else ""
    if kind == "moved module":
        for module in modules:
            patch(sys.modules, module.__name__, None)
        return modules[0].__name__
    owner, name, found = _place(modules, seam.name)
    if kind == "renamed":
        first, is_fixed = seam.name.split(".")[0], inspect.isclass(owner) and issubclass(owner, Enum)
        for module in modules:
            if is_fixed:
                patch(module, first, SimpleNamespace())
            else:
                patch(module if "." not in seam.name else owner, name, _Gone)
        inherited = [each for each in getattr(owner, "__mro__", ())[1:] if hasattr(each, name)]
        return nowhere or (f"{seam.path} " if inherited and not is_fixed else f"{seam.path} is gone")
    if kind == "other body":
        keep = names_read(found) - set(seam.reads) if seam.reads else names_read(found) | {"some_new_option"}
        patch(owner, name, _reading(keep, found))
        return f"no longer uses {seam.reads[0]}" if seam.reads else "now uses some_new_option"
    signature = inspect.signature(found)
    if kind == "lost parameter":
        kept = [each for each in signature.parameters.values() if each.name != seam.parameters[0]]
        patch(owner, name, _with(signature.replace(parameters=kept), found))
        return f"{seam.path} has no parameter {seam.parameters[0]}"
    default = None if seam.others == "none" else inspect.Parameter.empty
    new = inspect.Parameter("extra", inspect.Parameter.KEYWORD_ONLY, default=default)
    last = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
    others = [each for each in signature.parameters.values() if each not in last]
    patch(owner, name, _with(signature.replace(parameters=[*others, new, *last]), found))
    return f"{seam.path} has a new parameter extra"


class _Gone:
    """Stands for an attribute to delete."""


def gone(value: object) -> bool:
    """Return whether an attribute is to be deleted rather than set."""
    return value is _Gone


def _place(modules: list, name: str) -> tuple[object, str, object]:
    for module in modules:
        owner, names = module, name.split(".")
        for part in names[:-1]:
            owner = getattr(owner, part, None)
        if hasattr(owner, names[-1]):
            return owner, names[-1], getattr(owner, names[-1])
    raise LookupError(name)


def _with(signature: inspect.Signature, like: object) -> Callable:
    def stand_in(*args, **kwargs):
        raise AssertionError("only its signature counts")

    stand_in.__signature__ = signature
    return stand_in


def _reading(names: frozenset[str], like: object) -> object:
    """Return a function, or a class, whose code reads these names, with the parameters of `like`."""
    lines = [f"    x.{name}" for name in sorted(names) if "." not in name]
    scope: dict = {}
    dotted = [f"    import {name}" for name in sorted(names) if "." in name]
    exec("def stand_in(x):\n" + "\n".join([*lines, *dotted, "    pass"]), scope)
    function = scope["stand_in"]
    if inspect.isclass(like):
        return type(like.__name__, (), {"method": function})
    function.__signature__ = inspect.signature(like)
    return function

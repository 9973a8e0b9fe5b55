"""The one way in which this plugin changes Megatron and torch: checked before use, idempotent, undone in one place.

A `Seam` says what the plugin relies on at one place. Three kinds of change:
  - `apply`: a function of Megatron that the plugin replaces wherever it is bound, until `undo`;
  - `together`: attributes of any objects, replaced under one name, until `undo`;
  - `changed`: attributes of one object, for the time of a `with` block.
`undo_all` takes back everything that `apply` and `together` did.
"""

import builtins
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from types import CodeType
from typing import Any

from ..console.errors import UserError

# Names that code may read without another meaning: builtins, types of annotations, methods of lists and the like.
_COSMETIC = {*dir(builtins), *dir(typing), *(name for kind in (str, list, dict, tuple, set) for name in dir(kind))}
_MISSING = object()
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
MOST_SHOWN = 4  # names in one message


class SeamError(UserError):
    """This Megatron, or this torch, is not the one the plugin was written for."""


@dataclass(frozen=True)
class Seam:
    """What the plugin relies on at one place of Megatron or torch.

    name: of a function, a class ("Class", "Class.method") or a value in the module; "" is the module itself.
    why: what it is needed for, a phrase behind "it".
    parameters: names of parameters that it has; of a class, those of its constructor.
    others: the further parameters that it may have: "any", "optional" ones where the plugin calls it, or "none" where
        the plugin takes its place.
    reads: names that its code reads: globals, attributes, keywords.
    known: (release, all names that its code reads) of the tested releases, where the plugin does its work itself.
    also_in: modules that hold it in other tested releases.
    only_if: needed only where another seam has this parameter, or its code reads this name.
    """

    module: str
    name: str
    why: str
    parameters: tuple[str, ...] = ()
    others: str = "any"
    reads: tuple[str, ...] = ()
    known: tuple[tuple[str, frozenset[str]], ...] = ()
    also_in: tuple[str, ...] = ()
    only_if: "tuple[Seam, str] | None" = None

    @property
    def path(self) -> str:
        """Return the place as one writes it."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def current(self) -> Callable[..., Any]:
        """Return the function that is bound there now; SeamError unless it fits."""
        reason = self.misfit()
        if reason is not None:
            raise SeamError(f"{reason}; {self.why}")
        return self._find()[0]  # type: ignore[no-any-return]

    def check_call(self, *args: Any, **kwargs: Any) -> None:
        """Raise SeamError for a call whose parameters depend on the release, if this one takes them otherwise."""
        try:
            inspect.signature(self._find()[0]).bind(*args, **kwargs)
        except TypeError as error:
            raise SeamError(f"{self.path} is called otherwise in this release ({error}); {self.why}") from None

    def misfit(self) -> str | None:
        """Return what has changed here, a phrase that names the place; None if all is as the plugin needs it."""
        if self.only_if is not None and not self.only_if[0]._knows(self.only_if[1]):
            return None
        found, reason = self._find()
        if reason is not None:
            return reason
        if _hands_on(found):
            return None
        changes = [*self._parameters_changed(found), *self._code_changed(found)]
        return f"{self.path} {' and '.join(changes)}" if changes else None

    def _find(self) -> tuple[Any, str | None]:
        """Return what is at this place, or why nothing is."""
        first = None
        for module in (self.module, *self.also_in):
            try:
                holder = importlib.import_module(module)
            except ModuleNotFoundError as error:
                is_gone = error.name is not None and f"{module}.".startswith(f"{error.name}.")
                reason = f"the module {error.name} is gone" if is_gone else f"{module} cannot be imported ({error})"
            except Exception as error:  # whatever a module does at import: the user learns which seam needs it
                reason = f"{module} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
            else:
                found: Any = holder
                for part in filter(None, self.name.split(".")):
                    found = getattr(found, part, _MISSING)
                if found is not _MISSING:
                    return found, None
                reason = f"{self.path} is gone"
            first = first or reason
        others = " nor in ".join(self.also_in)
        return None, f"{self.name} is neither in {self.module} nor in {others}" if others else first

    def _knows(self, name: str) -> bool:
        found = self._find()[0]
        return found is not None and (name in names_read(found) or name in inspect.signature(found).parameters)

    def _parameters_changed(self, found: Any) -> Iterator[str]:
        if not self.parameters and self.others == "any":
            return
        theirs = inspect.signature(found).parameters
        fields = getattr(found, "__dataclass_fields__", ())  # some are not the constructor's
        missing = [name for name in self.parameters if name not in theirs and name not in fields]
        if missing:
            yield f"has no parameter {', '.join(missing)}"
        if self.others != "any":
            more = [
                name
                for name, each in theirs.items()
                if name not in (*self.parameters, "self", "ctx") and each.kind not in _VARIADIC
                and (self.others == "none" or each.default is inspect.Parameter.empty)
            ]  # fmt: skip
            if more:
                yield f"has a new parameter {', '.join(more)}"

    def _code_changed(self, found: Any) -> Iterator[str]:
        if not self.reads and not self.known:
            return
        names = names_read(found)
        went = [name for name in self.reads if name not in names]
        if went:
            yield f"no longer uses {_listed(went)}"
        if self.known and all(names != theirs for _, theirs in self.known):
            release, nearest = min(self.known, key=lambda each: len(each[1] ^ names))
            came, left = sorted(names - nearest), sorted(nearest - names)
            yield " and ".join(
                f"{verb} {_listed(some)}"
                for verb, some in (("now uses", came), ("no longer uses", left))
                if some
            ) + f" (beside that of {release})"  # fmt: skip


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _hands_on(found: Any) -> bool:
    """Return whether it is somebody's wrapper of Megatron's function, which cannot be seen behind it.

    That is def wrapper(*args, **kwargs), also with self before these; not what a class inherits from torch.
    """
    function = found.__init__ if inspect.isclass(found) else found
    if not inspect.isfunction(function) or (function.__module__ or "").startswith("torch."):
        return False
    kinds = tuple(each.kind for each in inspect.signature(function).parameters.values())
    return kinds in (_VARIADIC, (inspect.Parameter.POSITIONAL_OR_KEYWORD, *_VARIADIC))


def names_read(target: Any) -> frozenset[str]:
    """Return the names that the code of a function, or of all methods of a class, reads; nested functions included.

    These are globals, attributes, keywords of calls, and texts that are names, as in getattr(config, "some_option").
    Local variables, comments, messages and the order of statements do not count.
    """
    if inspect.isclass(target):
        return frozenset().union(*(names_read(each) for each in vars(target).values() if _code(each) is not None))
    code = _code(target)
    return frozenset() if code is None else frozenset(_names(code) - _COSMETIC)


def _code(target: Any) -> CodeType | None:
    function = getattr(target, "__func__", None) or getattr(target, "fget", None) or target
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)

    def add(constants: tuple[Any, ...]) -> None:
        for each in constants:
            if isinstance(each, CodeType):
                found.update(_names(each))
            elif isinstance(each, tuple):
                add(each)
            elif isinstance(each, str) and each.isidentifier() and "_" in each.strip("_"):
                found.add(each)

    add(code.co_consts)
    return found


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
    """Put `new` in the place of `old` in every module; of a "Class.method", in the class that modules hold."""
    kind, _, name = name.rpartition(".")
    for module in list(sys.modules.values()):
        # vars, not getattr: lazy modules import what they are asked for.
        found = getattr(module, "__dict__", {})
        holder = found.get(kind) if kind else module
        if getattr(holder, "__dict__", {}).get(name) is old:
            setattr(holder, name, new)

"""Act once Megatron has been imported, whoever imports it, and whenever. Standard library only.

A process of a trainer that never touches Megatron must not wait for it: not the driver of a Ray job, nor a worker that
generates. And a trainer may import megatron.training long after Megatron-Core.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import seams

_FAMILY = "megatron"  # Megatron-LM and Megatron-Core, and what others put into the same namespace


def after_import(module: str, act: Callable[[], object]) -> None:
    """Call `act` once `module` has been imported: now, if it has been; not any more after seams.undo_all.

    act runs when the outermost import of one of Megatron's modules is through, when none of them is half imported, and
    before the importing statement goes on. If it raises, that import fails, and so does each one after it.
    """
    if _is_imported(module):
        act()
        return
    key = "after the import of", module
    seams.undo(key)
    with seams.together(key) as undo:
        _AWAITED[module] = act
        undo.callback(_AWAITED.pop, module, None)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
            undo.callback(sys.meta_path.remove, _FINDER)


def _is_imported(module: str) -> bool:
    found = sys.modules.get(module)
    return found is not None and not getattr(found.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds what the others find; the modules of Megatron then tell when they have been executed."""

    def __init__(self) -> None:
        self._here = threading.local()  # depth: how many imports of this thread are being executed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _FAMILY or not _AWAITED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for each in others if (found := each.find_spec(fullname, path, target)) is not None), None)
        loader = None if spec is None else spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            # Set on this one object, which serves one module: a loader of another class would hide what it can do.
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)
                with self._outermost():
                    execute(module)

            vars(loader)["exec_module"] = exec_module
        return spec

    @contextmanager
    def _outermost(self) -> Iterator[None]:
        """Act on what has been imported within, unless another import is being executed around this one."""
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        try:
            yield
        finally:
            self._here.depth = depth
        if depth == 0:
            for module in [name for name in _AWAITED if name in sys.modules]:
                act = _AWAITED.pop(module, None)  # it may import, and come here again
                if act is not None:
                    _act(module, act)


def _act(module: str, act: Callable[[], object]) -> None:
    try:
        act()
    except BaseException:
        # A trainer that catches the error and imports again must not go on without: these are executed once more.
        _AWAITED[module] = act
        while module:
            sys.modules.pop(module, None)
            module = module.rpartition(".")[0]
        raise


_AWAITED: dict[str, Callable[[], object]] = {}
_FINDER = _Finder()

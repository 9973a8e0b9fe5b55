"""A seam that is an assertion in the midst of a function of Megatron: it is removed for the time of a call."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType
from typing import Any

from ..seams import Seam, SeamError, changed


@dataclass(frozen=True)
class Assertion(Seam):
    """An `assert` right below an `if` of a function, once.

    condition, test: of the `if` and of the `assert`, as Python writes them.
    """

    condition: str = ""
    test: str = ""

    def removed_from(self, function: Any) -> AbstractContextManager[None]:
        """Run the function without the assertion for a while; SeamError unless it is there once.

        Hiding the values that it looks at instead would mislead other checks that depend on them.
        """
        function = inspect.unwrap(function)
        code, count = self._without(function)
        if count != 1:
            raise SeamError(f"{self.path} {self._counted(count)}; {self.why}")
        return changed(function, __code__=code)

    def _code_changed(self, found: Any) -> Iterator[str]:
        yield from super()._code_changed(found)
        count = self._without(inspect.unwrap(found))[1]
        if count != 1:
            yield self._counted(count)

    def _counted(self, count: int) -> str:
        return f"has {count} assertions `{self.test}` below `if {self.condition}`, not 1"

    def _without(self, function: Any) -> tuple[CodeType, int]:
        """Return the function's code with the assertions removed, and how many there were."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        remove = _Remove(self.condition, self.test)
        remove.visit(tree)
        ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)  # for tracebacks
        module = compile(tree, inspect.getfile(function), "exec", dont_inherit=True)
        codes = (constant for constant in module.co_consts if isinstance(constant, CodeType))
        return next(code for code in codes if code.co_name == function.__name__), remove.count


class _Remove(ast.NodeTransformer):
    """`assert <test>` right below `if <condition>:` becomes `pass`."""

    def __init__(self, condition: str, test: str):
        self._condition, self._test, self.count = condition, test, 0

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.test) == self._condition:
            for index, statement in enumerate(node.body):
                if isinstance(statement, ast.Assert) and ast.unparse(statement.test) == self._test:
                    node.body[index] = ast.copy_location(ast.Pass(), statement)
                    self.count += 1
        return node

"""What `__all__` says, also where it is computed: an AST pass that never executes anything.

griffe gives up on `extend_all(module)`, `[s for s in dir() …]`, `globals()` and the like, and then
drops wildcard re-exports: all of `numpy.argsort` and hundreds more.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Exports:
    """`names` listed literally; `modules` whose public names are taken over whole.

    `open` is set where some of it can't be told: then every public name counts as exported.
    """

    names: set[str] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    open: bool = False
    removed: set[str] = field(default_factory=set)


def find_exports(syntax: ast.Module) -> Exports | None:
    """None where a module has no `__all__`."""
    found: Exports | None = None
    for statement in _statements(syntax.body):
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(_is_all(target) for target in targets) and statement.value is not None:
                found = Exports()
                _take(statement.value, found)
        elif isinstance(statement, ast.AugAssign) and _is_all(statement.target):
            found = found or Exports()
            _take(statement.value, found)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            found = _called(statement.value, found)
        elif isinstance(statement, ast.For | ast.While) and _mentions_all(statement):
            found = found or Exports()
            found.open = True
    return found


def _called(call: ast.Call, found: Exports | None) -> Exports | None:
    function = call.func
    if isinstance(function, ast.Attribute) and _is_all(function.value):
        found = found or Exports()
        if function.attr == "remove":
            found.removed |= {text.value for text in call.args if _is_text(text)}  # type: ignore[attr-defined]
        else:
            for argument in call.args:
                _take(argument, found)
    elif isinstance(function, ast.Name) and "extend_all" in function.id:
        found = found or Exports()
        found.modules += [ast.unparse(argument) for argument in call.args]
    return found


def _take(node: ast.expr, found: Exports) -> None:
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        for element in node.elts:
            if isinstance(element, ast.Starred):
                _take(element.value, found)
            elif _is_text(element):
                found.names.add(element.value)  # type: ignore[attr-defined]
            else:
                found.open = True
    elif _is_text(node):
        found.names.add(node.value)  # type: ignore[attr-defined]
    elif isinstance(node, ast.BinOp):
        _take(node.left, found)
        _take(node.right, found)
    elif isinstance(node, ast.Attribute) and node.attr == "__all__":
        found.modules.append(ast.unparse(node.value))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        if node.func.id in ("list", "sorted", "tuple", "set"):
            _take(node.args[0], found)
        else:
            found.open = True
    else:
        found.open = True


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those inside `if` and `try` too."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, name, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


top_level: Callable[[list[ast.stmt]], Iterator[ast.stmt]] = _statements


def _is_all(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "__all__"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _mentions_all(node: ast.stmt) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "__all__" for part in ast.walk(node))

"""Text that a module computes from constants: `%`, `.format`, `+`, dedent, dicts of strings.

pandas keeps its docstrings in `_shared_docs` and fills them in with decorators; matplotlib
interpolates. Folding these by hand, on the syntax tree, gives what an import would, without one.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ragfleet.corpus.exports import top_level
from ragfleet.corpus.linker import Definition, Linker

_MAX_DEPTH: Final = 30
_MAX_CHARS: Final = 1 << 20


class Unknown(Exception):
    """The value can't be told without running the code."""


class Constants:
    """Evaluates expressions of a module over the constants of its package."""

    def __init__(self, linker: Linker) -> None:
        self._linker = linker
        self._assigned: dict[str, dict[str, list[tuple[str, Any, ast.expr]]]] = {}
        self._values: dict[tuple[str, str], Any] = {}
        self._depth = 0
        self._scope: Mapping[str, Any] = {}
        self._owner: Definition | None = None

    @contextlib.contextmanager
    def inside(self, scope: Mapping[str, Any], owner: Definition | None = None) -> Iterator[None]:
        """Names of a function's body (Unknown where they can't be told) or of a class's come
        before the module's."""
        before = self._scope, self._owner
        self._scope, self._owner = scope, owner
        try:
            yield
        finally:
            self._scope, self._owner = before

    def value(self, module: str, node: ast.expr) -> Any:
        """Raises Unknown."""
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                raise Unknown
            value = self._value(module, node)
            if isinstance(value, str) and len(value) > _MAX_CHARS:
                raise Unknown
            return value
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Unknown from error
        finally:
            self._depth -= 1

    def text(self, module: str, node: ast.expr) -> str | None:
        try:
            value = self.value(module, node)
        except Unknown:
            return None
        return value if isinstance(value, str) else None

    def _value(self, module: str, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._local(module, node.id)
        if isinstance(node, ast.BinOp):
            return self._operation(module, node)
        if isinstance(node, ast.JoinedStr):
            return "".join(self._piece(module, part) for part in node.values)
        if isinstance(node, ast.Dict):
            return self._dict(module, node)
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return tuple(self.value(module, element) for element in node.elts)
        if isinstance(node, ast.Subscript):
            return self.value(module, node.value)[self.value(module, node.slice)]
        if isinstance(node, ast.Call):
            return self._call(module, node)
        if isinstance(node, ast.Attribute):
            return self._attribute(module, node)
        raise Unknown

    def _operation(self, module: str, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.Add | ast.BitOr):
            sides = [self._or_none(module, side) for side in (node.left, node.right)]
            if None in sides:
                # Of a long text one computed piece can't be told: the rest is worth having.
                known = next((side for side in sides if isinstance(side, tuple)), None)
                if known is not None:
                    return known
                text = "".join(side for side in sides if isinstance(side, str))
                if not text:
                    raise Unknown
                return f"{text}..." if sides[1] is None else f"...{text}"
            return sides[0] + sides[1]
        left = self.value(module, node.left)
        if isinstance(node.op, ast.Mod) and isinstance(left, str):
            return percent(left, self._parameters(module, node.right))
        right = self.value(module, node.right)
        if isinstance(node.op, ast.Mult) and isinstance(right, int) and right < 200:
            return left * right
        raise Unknown

    def _or_none(self, module: str, node: ast.expr) -> Any:
        try:
            return self.value(module, node)
        except Unknown:
            return None

    def _piece(self, module: str, part: ast.expr) -> str:
        return str(self.value(module, part.value if isinstance(part, ast.FormattedValue) else part))

    def _parameters(self, module: str, node: ast.expr) -> Any:
        """The right side of `%`; entries that can't be told are left out, not the whole."""
        if isinstance(node, ast.Dict):
            return self._dict(module, node)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "dict"
        ):
            return self._dict_call(module, node)
        return self.value(module, node)

    def _dict(self, module: str, node: ast.Dict) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            try:
                if key is None:
                    result.update(self.value(module, value))
                else:
                    result[self.value(module, key)] = self.value(module, value)
            except Unknown:
                continue
        return result

    def _dict_call(self, module: str, node: ast.Call) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for argument in node.args:
            result.update(self.value(module, argument))
        for keyword in node.keywords:
            try:
                value = self.value(module, keyword.value)
            except Unknown:
                continue
            if keyword.arg is None:
                result.update(value)
            else:
                result[keyword.arg] = value
        return result

    def _call(self, module: str, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if last == "dict" and name == "dict":
            return self._dict_call(module, node)
        if name in ("list", "tuple", "set", "sorted") and len(node.args) == 1:
            return tuple(self.value(module, node.args[0]))
        if last in ("dedent", "cleandoc", "getdoc", "str"):
            text = self.value(module, node.args[0])
            return inspect.cleandoc(text) if last == "cleandoc" else textwrap.dedent(text)
        if isinstance(node.func, ast.Attribute):
            owner = self.value(module, node.func.value)
            if isinstance(owner, str) and last in (
                "strip",
                "lstrip",
                "rstrip",
                "format",
                "replace",
                "join",
            ):
                arguments = [self.value(module, argument) for argument in node.args]
                if last == "format":
                    return owner.format(*arguments, **self._keywords(module, node))
                return getattr(owner, last)(*arguments)
        raise Unknown

    def _keywords(self, module: str, node: ast.Call) -> dict[str, Any]:
        keywords = ast.Call(func=node.func, args=[], keywords=node.keywords)
        return self._dict_call(module, keywords)

    def _attribute(self, module: str, node: ast.Attribute) -> Any:
        if node.attr == "__doc__":
            found = self._linker.expression(module, ast.unparse(node.value))
            doc = found.doc if found is not None else None
            if doc is None and found is not None and found.tree is not None:
                doc = found.tree.docstring.value if found.tree.docstring else None
            if doc is None:
                raise Unknown
            return doc
        owner = self._linker.expression(module, ast.unparse(node.value))
        if owner is not None and owner.kind == "class":
            return self._of_class(owner, node.attr)
        if owner is None or owner.kind != "module":
            raise Unknown
        return self.named(owner.path, node.attr)

    # ---- names

    def _local(self, module: str, name: str) -> Any:
        if name in self._scope:
            value = self._scope[name]
            if value is Unknown:
                raise Unknown
            return value
        if self._owner is not None and name in self._owner.members:
            return self._of_class(self._owner, name)
        return self.named(module, name)

    def _of_class(self, cls: Definition, name: str) -> Any:
        """The value of a class's attribute."""
        found = self._linker.member(cls, name)
        if found is None or found.kind != "attribute" or found.module is None:
            raise Unknown
        if found.tree is None or found.tree.value is None:
            raise Unknown
        try:
            node = ast.parse(str(found.tree.value), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise Unknown from error
        with self.inside({}, found.owner):
            return self.value(found.module.path, node)

    def named(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._values:
            self._values[key] = Unknown
            with self.inside({}):
                self._values[key] = self._named(module, name)
        value = self._values[key]
        if value is Unknown:
            raise Unknown
        return value

    def _named(self, module: str, name: str) -> Any:
        value: Any = Unknown
        for how, key, node in self._assignments(module).get(name, ()):
            try:
                if how == "=":
                    value = self.value(module, node)
                elif how == "+=":
                    value = value + self.value(module, node)
                elif how == "update":
                    base = {} if value is Unknown else value
                    value = {**base, **self.value(module, node)}
                else:
                    base = self._imported(module, name) if value is Unknown else value
                    base = {} if base is Unknown else base
                    value = {**base, self.value(module, key): self.value(module, node)}
            except (Unknown, TypeError):
                continue
        return self._imported(module, name) if value is Unknown else value

    def _imported(self, module: str, name: str) -> Any:
        binding = self._linker.namespace(module).get(name)
        if binding is None or binding.target is None:
            return Unknown
        above, _, last = binding.target.rpartition(".")
        if above not in self._linker.modules:
            return Unknown
        try:
            return self.named(above, last)
        except Unknown:
            return Unknown

    def _assignments(self, module: str) -> dict[str, list[tuple[str, Any, ast.expr]]]:
        found = self._assigned.get(module)
        if found is None:
            found = defaultdict(list)
            known = self._linker.modules.get(module)
            for statement in top_level(known.syntax.body if known else []):
                _note(statement, found)
                if isinstance(statement, ast.ClassDef):  # a class's body adds to the module's dicts
                    for inner in statement.body:
                        if isinstance(inner, ast.Assign) and isinstance(
                            inner.targets[0], ast.Subscript
                        ):
                            _note(inner, found)
            self._assigned[module] = found
        return found


def _note(statement: ast.stmt, found: dict[str, list[tuple[str, Any, ast.expr]]]) -> None:
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                found[target.id].append(("=", None, statement.value))
            elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                found[target.value.id].append(("[]", target.slice, statement.value))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        if statement.value is not None:
            found[statement.target.id].append(("=", None, statement.value))
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        found[statement.target.id].append(("+=", None, statement.value))
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "update"
            and isinstance(call.func.value, ast.Name)
        ):
            node: ast.expr = call.args[0] if call.args else ast.Dict([], [])
            if not call.args:
                node = ast.Dict(
                    [ast.Constant(keyword.arg) for keyword in call.keywords],
                    [keyword.value for keyword in call.keywords],
                )
            found[call.func.value.id].append(("update", None, node))


class _Left(dict[str, Any]):
    """`%(name)s` that nobody fills in stays as it is."""

    def __missing__(self, key: str) -> str:
        return f"%({key})s"


def percent(text: str, parameters: Any) -> str:
    """`text % parameters`; raises TypeError or ValueError as that does."""
    if isinstance(parameters, dict):
        return text % _Left(parameters)
    return str(text % parameters)

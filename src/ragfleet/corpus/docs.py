"""A definition's documentation: its docstring with decorators applied, or whoever lends it one."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any, Final

from ragfleet.corpus.constants import Constants, Unknown, percent
from ragfleet.corpus.exports import top_level
from ragfleet.corpus.linker import Definition, Linker

_COPYING: Final = re.compile(
    r"autogen_docstring|copy|Appender|^doc$|inherit|wraps|_doc|from_docs|docstring", re.IGNORECASE
)
_NAME: Final = re.compile(r"%\((\w+)\)s")
_MAX_DEPTH: Final = 8


class Docs:
    """Docstrings of definitions, cleaned as `inspect.cleandoc` does."""

    def __init__(self, linker: Linker, constants: Constants) -> None:
        self._linker, self._constants = linker, constants
        self._known: dict[int, str] = {}
        self._set: dict[str, dict[str, ast.expr]] = {}
        self._depth = 0

    def of(self, found: Definition) -> str:
        """The documentation; empty where there is none to be found."""
        key = id(found)
        if key not in self._known:
            self._known[key] = ""
            self._depth += 1
            try:
                if self._depth < _MAX_DEPTH:
                    with self._constants.inside({}):  # not in the scope of whoever asks
                        self._known[key] = inspect.cleandoc(self._find(found))
            finally:
                self._depth -= 1
        return self._known[key]

    def _find(self, found: Definition) -> str:
        doc = self._own(found)
        if found.kind == "function" and found.tree is not None:
            doc = self._decorated(found, doc)
        if not doc and found.kind == "attribute" and found.module is not None:
            doc = self._decorated_value(found) or self._given(found)
        if not doc and found.doc:
            doc = found.doc
        if not doc:
            doc = self._assigned(found)
        if not doc and found.owner is not None:
            doc = self._inherited(found)
        if not doc and found.kind == "instance" and found.instance_of is not None:
            classes = self._linker.mro(found.instance_of)
            doc = next((text for text in map(self.of, classes) if text), "")
        if not doc and found.kind == "class":
            init = found.members.get("__init__")
            doc = self.of(init) if init is not None and init.owner is found else ""
            for base in found.bases:  # as `inspect.getdoc` has it, for classes of C code
                doc = doc or self.of(base)
        if "%(" in doc and found.module is not None:
            doc = self._interpolated(doc)
        return doc

    def _own(self, found: Definition) -> str:
        for tree in (found.tree, _stub_of(found)):
            docstring = None if tree is None else tree.docstring
            if docstring is not None and docstring.value.strip():
                return str(docstring.value)
        return ""

    def _inherited(self, found: Definition) -> str:
        assert found.owner is not None
        for base in self._linker.mro(found.owner)[1:]:
            member = base.members.get(found.name)
            if member is not None and member is not found:
                doc = self.of(member)
                if doc:
                    return doc
        return ""

    # ---- decorators

    def _decorated(self, found: Definition, doc: str) -> str:
        assert found.module is not None
        module = found.module.path
        for decorator in reversed(found.tree.decorators):
            try:
                node = ast.parse(str(decorator.value), mode="eval").body
            except (SyntaxError, ValueError):
                continue
            if isinstance(node, ast.Call):
                doc = self.applied(module, node, doc, found.owner)
        return doc

    def _decorated_value(self, found: Definition) -> str:
        """`read_csv = Appender(text)(read_csv)`."""
        assert found.module is not None
        node = _call_of(found)
        if node is None or not isinstance(node.func, ast.Call):
            return ""
        return self.applied(found.module.path, node.func, "", found.owner)

    def _given(self, found: Definition) -> str:
        """`year = accessor("year", "The year.")`: the argument of a parameter that is called `doc`
        or `docstring`; or a property's getter."""
        assert found.module is not None
        node, module = _call_of(found), found.module.path
        if node is None or isinstance(node.func, ast.Call):
            return ""
        names = ["fget", "fset", "fdel", "doc"]
        called = self._linker.expression(module, ast.unparse(node.func), found.owner)
        if called is not None and called.kind == "function" and called.tree is not None:
            names = [parameter.name for parameter in called.tree.parameters]
        elif ast.unparse(node.func) != "property":
            return ""
        given = dict(zip(names, node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        doc = given.get("doc", given.get("docstring", given.get("fget")))
        if doc is None:
            return ""
        with self._constants.inside({}, found.owner):
            return self._lent(module, doc, found.owner) or ""

    def applied(self, module: str, call: ast.Call, doc: str, owner: Definition | None) -> str:
        """The docstring `doc` after one decorator."""
        name = ast.unparse(call.func).rpartition(".")[2]
        if name == "Substitution":
            return self._substitute(module, call, doc)
        if name == "Appender" and call.args:
            text = self._lent(module, call.args[0], owner)
            return "" if text is None and not doc else doc + textwrap.dedent(text or "")
        if name == "doc" and call.args:
            text = self._lent(module, call.args[0], owner) or ""
            return self._formatted(module, call, doc or text)
        if doc or not call.args or not _COPYING.search(name):
            return doc
        return self._lent(module, call.args[0], owner) or doc

    def _substitute(self, module: str, call: ast.Call, doc: str) -> str:
        try:
            if call.args:
                positional = self._constants.value(module, ast.Tuple(call.args))
                return percent(doc, positional)
        except (Unknown, TypeError, ValueError):
            return doc
        parameters: dict[str, Any] = {}
        for keyword in call.keywords:
            try:
                value = self._constants.value(module, keyword.value)
            except Unknown:
                continue
            parameters.update(value if keyword.arg is None else {keyword.arg: value})
        return _filled(doc, parameters)

    def _formatted(self, module: str, call: ast.Call, doc: str) -> str:
        for keyword in call.keywords:
            text = self._constants.text(module, keyword.value)
            if keyword.arg is not None and text is not None:
                doc = doc.replace(f"{{{keyword.arg}}}", text)
        return doc

    def _lent(self, module: str, node: ast.expr, owner: Definition | None) -> str | None:
        """Text of an argument: a constant expression, or another definition's documentation."""
        text = self._constants.text(module, node)
        if text is not None:
            return text
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            return self._lent(module, node.left, owner)
        if isinstance(node, ast.Attribute) and node.attr == "__doc__":
            node = node.value
        lender = self._linker.expression(module, ast.unparse(node), owner)
        return None if lender is None or lender.kind == "module" else self.of(lender) or None

    # ---- elsewhere

    def _assigned(self, found: Definition) -> str:
        """`f.__doc__ = …` at the top of its module."""
        if found.module is None:
            return ""
        module = found.module.path
        assigned = self._set.get(module)
        if assigned is None:
            assigned = {}
            for statement in top_level(found.module.syntax.body):
                if isinstance(statement, ast.Assign):
                    for target in statement.targets:
                        if isinstance(target, ast.Attribute) and target.attr == "__doc__":
                            assigned[ast.unparse(target.value)] = statement.value
            self._set[module] = assigned
        node = assigned.get(found.path.removeprefix(f"{module}."))
        return "" if node is None else self._lent(module, node, None) or ""

    def _interpolated(self, doc: str) -> str:
        """matplotlib's `%(Line2D)s`: the registry is filled while it runs, so only what is left
        empty can be taken away."""
        return _NAME.sub(lambda match: f"[{match[1]}]", doc)


def _filled(doc: str, parameters: dict[str, Any]) -> str:
    return _NAME.sub(lambda match: str(parameters.get(match[1], match[0])), doc).replace("%%", "%")


def _call_of(found: Definition) -> ast.Call | None:
    """What an attribute is assigned, where that is a call."""
    value = "" if found.tree is None or found.tree.value is None else str(found.tree.value)
    if not 0 < len(value) < 5000 or not value.endswith(")"):
        return None
    try:
        node = ast.parse(value, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    return node if isinstance(node, ast.Call) else None


def _stub_of(found: Definition) -> Any:
    if found.module is None or found.module.stub is None:
        return None
    tree = found.module.stub
    for name in found.path.removeprefix(f"{found.module.path}.").split("."):
        tree = tree.members.get(name)
        if tree is None or tree.is_alias:
            return None
    return tree

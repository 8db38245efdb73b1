"""Members that classes get while their package is imported, told without importing it.

@delegate_names(Array, ["year", …], typ)   another class's members, under the same names
Frame._add_numeric_operations()            a classmethod with `cls.sum = make(cls, "sum", …)`
for name, cls in f(): Frame._make(name, cls)   instances, from a list that a function returns
add_flex_arithmetic_methods(Frame)         pandas' operators (`corpus.operators`)

A function made by a factory is documented by the decorators of the function inside, with the
factory's arguments in place of its parameters.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import griffe

from ragfleet.corpus.constants import Constants, Unknown
from ragfleet.corpus.docs import Docs
from ragfleet.corpus.exports import top_level
from ragfleet.corpus.linker import Definition, Linker
from ragfleet.corpus.modules import Module, Package
from ragfleet.corpus.operators import add_operators

_MAX_DEPTH: Final = 6


@dataclass
class _Body:
    """What is known inside a function's body: values, functions, imported names."""

    module: Module
    scope: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)


def add_generated(package: Package, linker: Linker, constants: Constants) -> None:
    """Put them into the members of their classes."""
    adder = _Adder(linker, constants)
    for path, module in package.modules.items():
        for statement in top_level(module.syntax.body):
            if isinstance(statement, ast.ClassDef):
                adder.delegate(path, statement)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                adder.call(path, statement.value)
            elif isinstance(statement, ast.For) and len(statement.body) == 1:
                adder.instances(path, statement)


class _Adder:
    def __init__(self, linker: Linker, constants: Constants) -> None:
        self._linker, self._constants = linker, constants
        self._docs = Docs(linker, constants)
        self._nodes: dict[str, dict[int, ast.FunctionDef]] = {}

    # ---- delegates

    def delegate(self, path: str, statement: ast.ClassDef) -> None:
        calls = [node for node in statement.decorator_list if isinstance(node, ast.Call)]
        for call in reversed(calls):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            if len(arguments) < 2 or not isinstance(arguments[0], ast.Name | ast.Attribute):
                continue
            lender = self._linker.expression(path, ast.unparse(arguments[0]))
            try:
                names = self._constants.value(path, arguments[1])
            except Unknown:
                continue
            cls = self._linker.lookup(path, statement.name)
            if lender is None or cls is None or {lender.kind, cls.kind} != {"class"}:
                continue
            for name in names if isinstance(names, tuple) else ():
                member = self._linker.member(lender, name) if isinstance(name, str) else None
                if member is not None and name not in cls.members:
                    cls.members[name] = member

    # ---- classmethods that assign to their class

    def call(self, path: str, call: ast.Call) -> None:
        """A call at the top of a module: `Class.method()`, or `add_operators(Class)`."""
        if len(call.args) == 1 and isinstance(call.args[0], ast.Name):
            add_operators(path, call, self._linker, self._constants)
        if isinstance(call.func, ast.Attribute) and not call.args and not call.keywords:
            cls = self._linker.expression(path, ast.unparse(call.func.value))
            if cls is not None and cls.kind == "class":
                self._run(cls, call.func.attr, 0)

    def instances(self, path: str, loop: ast.For) -> None:
        """A loop over (name, class) pairs that puts an instance of each on a class."""
        body, source = loop.body[0], loop.iter
        if not isinstance(body, ast.Expr) or not isinstance(body.value, ast.Call):
            return
        call = body.value
        targets = loop.target.elts if isinstance(loop.target, ast.Tuple) else []
        same = [ast.unparse(node) for node in targets] == [ast.unparse(node) for node in call.args]
        if not same or len(targets) != 2 or not isinstance(call.func, ast.Attribute):
            return
        holder = self._linker.expression(path, ast.unparse(call.func.value))
        if holder is None or holder.kind != "class" or not isinstance(source, ast.Call):
            return
        found = self._linker.expression(path, ast.unparse(source.func))
        node = None if found is None else self._node(found)
        returned = None if node is None else node.body[-1]
        if found is None or found.module is None or not isinstance(returned, ast.Return):
            return
        pairs = returned.value.elts if isinstance(returned.value, ast.List) else []
        for pair in pairs:
            if not isinstance(pair, ast.Tuple) or not isinstance(pair.elts[0], ast.Constant):
                continue
            name = str(pair.elts[0].value)
            cls = self._linker.expression(found.module.path, ast.unparse(pair.elts[-1]))
            if cls is not None and cls.kind == "class" and name not in holder.members:
                holder.members[name] = Definition(
                    f"{holder.path}.{name}", "instance", cls.module, cls.tree, holder, cls
                )

    def _run(self, cls: Definition, method: str, depth: int) -> None:
        found = self._linker.member(cls, method)
        node = None if found is None else self._node(found)
        if found is None or found.module is None or node is None or depth > _MAX_DEPTH:
            return
        if not node.args.args or "classmethod" not in map(ast.unparse, node.decorator_list):
            return
        me = node.args.args[0].arg
        body = _Body(found.module, {me: Unknown})
        for statement in self._statements(node, body):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                name = ast.unparse(statement.value.func)
                if name.startswith(f"{me}."):
                    self._run(cls, name.removeprefix(f"{me}."), depth + 1)
            elif isinstance(statement, ast.Assign):
                target = statement.targets[0]
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == me:
                    self._bind(cls, me, target.attr, statement.value, body)

    def _statements(self, node: ast.FunctionDef, body: _Body) -> Iterator[ast.stmt]:
        """The statements of a function; what they make known goes into `body`."""
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                body.functions[statement.name] = statement
            elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                for alias in statement.names:
                    body.imports[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
            elif isinstance(statement, ast.Assign):
                self._assign(statement, body)
            yield statement

    def _assign(self, statement: ast.Assign, body: _Body) -> None:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            body.scope[target.id] = self._value(statement.value, body)
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                body.scope[ast.unparse(element)] = Unknown

    def _bind(self, cls: Definition, me: str, name: str, value: ast.expr, body: _Body) -> None:
        made = None
        if isinstance(value, ast.Name) and value.id in body.functions:
            made = self._function(cls, name, body.functions[value.id], body)
        elif isinstance(value, ast.Attribute) and ast.unparse(value.value) == me:
            made = cls.members.get(value.attr)
        elif isinstance(value, ast.Call):
            made = self._from_factory(cls, name, value, body)
        if made is not None:
            cls.members[name] = made

    def _from_factory(
        self, cls: Definition, name: str, call: ast.Call, body: _Body
    ) -> Definition | None:
        factory, inner = self._factory(ast.unparse(call.func), body)
        if factory is None or inner is None:
            return None
        parameters = [argument.arg for argument in factory.args.args]
        for parameter, default in zip(
            reversed(parameters), reversed(factory.args.defaults), strict=False
        ):
            inner.scope[parameter] = self._value(default, inner)
        for parameter, argument in zip(parameters, call.args, strict=False):
            inner.scope[parameter] = self._value(argument, body)
        for keyword in call.keywords:
            if keyword.arg is not None:
                inner.scope[keyword.arg] = self._value(keyword.value, body)
        returned: set[str] = set()
        for statement in self._statements(factory, inner):
            if isinstance(statement, ast.Return) and statement.value is not None:
                parts = ast.walk(statement.value)
                returned |= {part.id for part in parts if isinstance(part, ast.Name)}
        made = [node for text, node in inner.functions.items() if text in returned]
        return self._function(cls, name, made[-1], inner) if made else None

    def _factory(self, name: str, body: _Body) -> tuple[ast.FunctionDef | None, _Body | None]:
        """A function, and what is known inside it before it begins."""
        if name in body.functions:
            return body.functions[name], _Body(body.module, dict(body.scope), {}, body.imports)
        found = self._linker.expression(body.module.path, name)
        if found is None or found.kind != "function" or found.module is None:
            return None, None
        return self._node(found), _Body(found.module)

    def _value(self, node: ast.expr, body: _Body) -> Any:
        with self._constants.inside(body.scope):
            try:
                return self._constants.value(body.module.path, node)
            except Unknown:
                return Unknown

    # ---- functions

    def _node(self, found: Definition) -> ast.FunctionDef | None:
        if found.kind != "function" or found.tree is None or found.module is None:
            return None
        nodes = self._nodes.get(found.module.path)
        if nodes is None:
            nodes = self._nodes[found.module.path] = {}
            for node in ast.walk(found.module.syntax):
                if isinstance(node, ast.FunctionDef):
                    nodes[node.lineno] = nodes[_first_line(node)] = node
        return nodes.get(found.tree.lineno)

    def _function(
        self, cls: Definition, name: str, node: ast.FunctionDef, body: _Body
    ) -> Definition:
        bare = copy.copy(node)
        bare.decorator_list = []
        if ast.get_docstring(node) is not None:
            bare.body = [*node.body[1:], ast.Pass()]
        tree = visited(bare, body.module)
        doc = ast.get_docstring(node, clean=False) or ""
        renamed = _Renamed(body.imports)
        with self._constants.inside(body.scope):
            for decorator in reversed(node.decorator_list):
                call = renamed.visit(copy.deepcopy(decorator))
                if isinstance(call, ast.Call):
                    doc = self._docs.applied(body.module.path, call, doc, cls)
        tree.lineno, tree.endlineno = _first_line(node), node.end_lineno
        return Definition(f"{cls.path}.{name}", "function", body.module, tree, cls, doc=doc)


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(part.lineno for part in node.decorator_list)])


class _Renamed(ast.NodeTransformer):
    """Names that a function imports itself, spelled out: the module does not know them."""

    def __init__(self, imports: dict[str, str]) -> None:
        self._imports = imports

    def visit_Name(self, node: ast.Name) -> ast.expr:
        target = self._imports.get(node.id)
        return node if target is None else ast.parse(target, mode="eval").body


def visited(node: ast.FunctionDef, module: Module) -> Any:
    """griffe's object for a function, for its parameters."""
    tree = griffe.visit(node.name, filepath=module.file, code=ast.unparse(node))
    return tree.members[node.name]

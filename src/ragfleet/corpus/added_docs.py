"""Docstrings of C functions that Python files attach: the shapes of `add_newdoc`.

add_newdoc('numpy.core.multiarray', 'array', doc)              a function
add_newdoc('numpy.core', 'nditer', ('copy', doc))              a method
add_newdoc('numpy.core', 'ndarray', [('sum', doc), …])         methods
add_newdoc('gamma', doc)                                       scipy.special: the file's package
add_newdoc_for_scalar_type('bool_', [aliases], doc)            numpy's scalar types
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Final

from ragfleet.corpus.constants import Constants
from ragfleet.corpus.linker import Definition, Linker
from ragfleet.corpus.modules import Package

_NAMES: Final = ("add_newdoc", "add_docstring", "add_newdoc_for_scalar_type")


def collect_added(package: Package, linker: Linker, constants: Constants) -> int:
    """Put every documented C function into `linker.added`; how many there are."""
    count = 0
    sources = [
        (path, module.syntax)
        for path, module in package.modules.items()
        if "add_newdoc" in module.text
    ]
    sources += [(_outer_module(file, package), syntax) for file, syntax in package.extra]
    for module, syntax in sources:
        reader = _Reader(module, linker, constants, _substitutions(syntax, module, constants))
        for node in ast.walk(syntax):
            if isinstance(node, ast.Call):
                count += reader.read(node)
    return count


class _Reader:
    def __init__(
        self, module: str, linker: Linker, constants: Constants, replaced: dict[str, str]
    ) -> None:
        self._module, self._linker, self._constants = module, linker, constants
        self._replaced = replaced

    def read(self, call: ast.Call) -> int:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name not in _NAMES:
            return 0
        arguments = call.args
        if name == "add_newdoc_for_scalar_type" and len(arguments) == 3:
            scalar = self._text(arguments[0])
            place = self._module.rpartition(".")[0]
            return self._add(f"{place}.numerictypes", scalar, self._text(arguments[2]))
        if len(arguments) == 2:
            place = self._module.rpartition(".")[0]
            return self._add(place, self._text(arguments[0]), self._text(arguments[1]))
        if len(arguments) < 3:
            return 0
        place_text, name_text = self._text(arguments[0]), self._text(arguments[1])
        if place_text is None or name_text is None:
            return 0
        doc = arguments[2]
        if isinstance(doc, ast.Tuple) and len(doc.elts) == 2:
            return self._member(place_text, name_text, doc)
        if isinstance(doc, ast.List):
            pairs = [pair for pair in doc.elts if isinstance(pair, ast.Tuple)]
            return sum(self._member(place_text, name_text, pair) for pair in pairs)
        return self._add(place_text, name_text, self._text(doc))

    def _text(self, node: ast.expr) -> str | None:
        return self._constants.text(self._module, node)

    def _place(self, place: str, name: str, is_class: bool = False) -> Definition:
        names = self._linker.added.setdefault(place, {})
        if name not in names:
            kind = "class" if is_class else "function"
            names[name] = Definition(f"{place}.{name}", kind, None)  # type: ignore[arg-type]
        if is_class:
            names[name].kind = "class"
        return names[name]

    def _add(self, place: str | None, name: str | None, doc: str | None) -> int:
        if not place or not name or doc is None or not name.isidentifier():
            return 0
        self._place(place, name).doc = self._cleaned(doc)
        return 1

    def _member(self, place: str, name: str, pair: ast.Tuple) -> int:
        member, doc = self._text(pair.elts[0]), self._text(pair.elts[1])
        if member is None or doc is None or not member.isidentifier():
            return 0
        cls = self._place(place, name, is_class=True)
        cls.members[member] = Definition(
            f"{cls.path}.{member}", "function", None, owner=cls, doc=self._cleaned(doc)
        )
        return 1

    def _cleaned(self, doc: str) -> str:
        doc = textwrap.dedent(doc).strip()
        for name, text in self._replaced.items():
            doc = doc.replace(f"${name}", text)
        return doc


def _substitutions(syntax: ast.Module, module: str, constants: Constants) -> dict[str, str]:
    """numpy's ufunc docs say $PARAMS and the like, from a dict `subst`."""
    for statement in syntax.body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id == "subst"
            and isinstance(statement.value, ast.Dict)
        ):
            pairs = zip(statement.value.keys, statement.value.values, strict=True)
            texts = {
                constants.text(module, key): constants.text(module, value)
                for key, value in pairs
                if key is not None
            }
            found = {key: value for key, value in texts.items() if key and value is not None}
            # The longest first: $OUT_SCALAR_1 also begins with $OUT.
            return dict(sorted(found.items(), key=lambda item: -len(item[0])))
    return {}


def _outer_module(file: Path, package: Package) -> str:
    """A name for a file outside the modules: the dotted path below its root."""
    parts = list(file.with_suffix("").parts)
    for root in package.roots:
        if root in parts:
            return ".".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    return package.roots[0] if package.roots else file.stem

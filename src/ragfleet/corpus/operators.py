"""pandas' operator methods (`Series.add`, `DataFrame.eq`), which it makes from a table.

`add_flex_arithmetic_methods(cls)` chooses among factories by the class, which no reading of
constants tells. The table and the templates are constants, and stand in `pandas.core.ops` in the
versions that do this (0.20 to 1.x; later ones spell the methods out).
"""

from __future__ import annotations

import ast
from typing import Any, Final

import griffe

from ragfleet.corpus.constants import Constants, Unknown
from ragfleet.corpus.linker import Definition, Linker

_ADDER: Final = "add_flex_arithmetic_methods"
_PLACES: Final = ("pandas.core.ops.docstrings", "pandas.core.ops")
_COMPARISONS: Final = ("eq", "ne", "lt", "gt", "le", "ge")
_SAME: Final = {
    "div": "truediv",
    "rdiv": "rtruediv",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "truediv",
}
_PARAMETERS: Final = {
    "series": "self, other, level=None, fill_value=None, axis=0",
    "dataframe": "self, other, axis='columns', level=None, fill_value=None",
    "comparison": "self, other, axis='columns', level=None",
}


def add_operators(path: str, call: ast.Call, linker: Linker, constants: Constants) -> None:
    """For a call at the top of module `path`; nothing unless it is pandas' own."""
    if ast.unparse(call.func).rpartition(".")[2] != _ADDER:
        return
    cls = linker.expression(path, ast.unparse(call.args[0]))
    if cls is None or cls.kind != "class" or cls.name not in ("Series", "DataFrame"):
        return  # sparse ones inherit theirs
    typ = cls.name.lower()
    for place in _PLACES:
        try:
            table = constants.named(place, "_op_descriptions")
            template = constants.named(
                place, "_flex_doc_SERIES" if typ == "series" else "_flex_doc_FRAME"
            )
            comparison = template
            if typ == "dataframe":
                comparison = constants.named(place, "_flex_comp_doc_FRAME")
        except Unknown:
            continue
        _add(cls, typ, table, template, comparison)
        return


def _add(cls: Definition, typ: str, table: Any, template: str, comparison: str) -> None:
    for name, row in table.items():
        if not isinstance(row, dict) or not {"op", "desc"} <= row.keys():
            continue
        if name == "divmod" and typ == "dataframe":
            continue
        fields = {"op": "", "desc": "", "reverse": None, **row}
        reverse = fields["reverse"]
        shown = comparison if name in _COMPARISONS else template
        kind = "comparison" if name in _COMPARISONS and typ == "dataframe" else typ
        equivalent = f"{typ} {fields['op']} other"
        examples = row.get("series_examples" if typ == "series" else "df_examples") or ""
        _define(cls, name, kind, _filled(shown, fields, name, equivalent, reverse) + examples)
        if isinstance(reverse, str):
            equivalent = f"other {fields['op']} {typ}"
            _define(cls, reverse, kind, _filled(shown, fields, reverse, equivalent, name))
    for name, original in _SAME.items():
        if original in cls.members:
            cls.members[name] = cls.members[original]


def _filled(template: str, row: dict[str, Any], name: str, equivalent: str, reverse: Any) -> str:
    try:
        return template.format(
            desc=row["desc"], op_name=name, equiv=equivalent, reverse=reverse or name
        )
    except (KeyError, IndexError, ValueError):
        return ""


def _define(cls: Definition, name: str, kind: str, doc: str) -> None:
    if not doc or cls.module is None:
        return
    code = f"def {name}({_PARAMETERS[kind]}): pass"
    tree = griffe.visit(name, filepath=cls.module.file, code=code).members[name]
    tree.lineno = tree.endlineno = None  # it stands nowhere
    cls.members[name] = Definition(f"{cls.path}.{name}", "function", cls.module, tree, cls, doc=doc)

"""numpy's scalar types, which C code makes: their bases and their other names.

`add_newdoc` documents `generic`, with the methods that all of them have, and most of the types.
What is derived from what, and that `float64` is `double`, stands in C alone, so it stands here: as
on 64-bit Linux and macOS. Another name that the version's own files never mention is left out.
"""

from __future__ import annotations

from typing import Final

from ragfleet.corpus.linker import Definition, Linker

_BASES: Final = {
    "number": "generic",
    "integer": "number",
    "signedinteger": "integer",
    "unsignedinteger": "integer",
    "inexact": "number",
    "floating": "inexact",
    "complexfloating": "inexact",
    "flexible": "generic",
    "character": "flexible",
    "bool_": "generic",
    "object_": "generic",
    "datetime64": "generic",
    "timedelta64": "signedinteger",
    "str_": "character",
    "bytes_": "character",
    "void": "flexible",
    **dict.fromkeys(("byte", "short", "intc", "int_", "longlong"), "signedinteger"),
    **dict.fromkeys(("ubyte", "ushort", "uintc", "uint", "ulonglong"), "unsignedinteger"),
    **dict.fromkeys(("half", "single", "double", "longdouble"), "floating"),
    **dict.fromkeys(("csingle", "cdouble", "clongdouble"), "complexfloating"),
}
_OTHER_NAMES: Final = {
    "byte": ("int8",),
    "short": ("int16",),
    "intc": ("int32",),
    "int_": ("int64", "intp", "int0"),
    "ubyte": ("uint8",),
    "ushort": ("uint16",),
    "uintc": ("uint32",),
    "uint": ("uint64", "uintp", "uint0"),
    "half": ("float16",),
    "single": ("float32",),
    "double": ("float64", "float_"),
    "longdouble": ("float128", "longfloat"),
    "csingle": ("complex64", "singlecomplex"),
    "cdouble": ("complex128", "complex_", "cfloat"),
    "clongdouble": ("complex256", "clongfloat", "longcomplex"),
    "bool_": ("bool8",),
    "str_": ("unicode_",),
    "bytes_": ("string_",),
}
_PLACES: Final = ("numpy.core.numerictypes", "numpy._core.numerictypes")
_SPOKEN_OF: Final = ("_add_newdocs", "_add_newdocs_scalars", "_type_aliases", "numerictypes")


def link_scalar_types(linker: Linker) -> None:
    """Complete what `add_newdoc` put into `linker.added`; nothing, for other packages."""
    for place in _PLACES:
        added = linker.added.get(place, {})
        if "generic" not in added:
            continue
        folder = place.rpartition(".")[0]
        modules = [linker.modules.get(f"{folder}.{name}") for name in _SPOKEN_OF]
        texts = [module.text for module in modules if module is not None]
        for name in _BASES:
            if name not in added:
                added[name] = Definition(f"{place}.{name}", "class", None)
        for name, base in _BASES.items():
            if name in added and base in added:
                added[name].kind = "class"
                added[name].bases.append(added[base])
        for name, others in _OTHER_NAMES.items():
            for other in others:
                if name in added and other not in added and _mentions(texts, other):
                    added[other] = added[name]


def _mentions(texts: list[str], name: str) -> bool:
    return any(f"'{name}'" in text or f'"{name}"' in text for text in texts)

"""API names as people write them, brought to dotted paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

CONVENTIONS: Final = {
    "np": "numpy",
    "pd": "pandas",
    "plt": "matplotlib.pyplot",
    "mpl": "matplotlib",
    "sns": "seaborn",
    "tf": "tensorflow",
    "nx": "networkx",
    "sp": "scipy",
    "sk": "sklearn",
}
_FROM: Final = re.compile(r"from\s+([\w.]+)\s+import\s+(\w+)(?:\s+as\s+\w+)?")
_IMPORT: Final = re.compile(r"import\s+([\w.]+)(?:\s+as\s+\w+)?")
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)


def normalise(text: str, roots: Collection[str], distributions: dict[str, str]) -> str:
    """A dotted path: without call and import syntax, conventional prefixes spelled out.

    Args:
        roots: import roots of the dependencies; `sp` stays `sp` where a package is called that.
        distributions: name of a distribution → its import root (scikit-learn → sklearn).
    """
    text = text.strip().strip("`'\"").strip()
    text = text.removeprefix("@").removeprefix(">>> ").strip()
    imported = _FROM.fullmatch(text)
    if imported is not None:
        text = f"{imported[1]}.{imported[2]}"
    elif (plain := _IMPORT.fullmatch(text)) is not None:
        text = plain[1]
    text = text.partition("(")[0].partition("[")[0].strip().strip(".")
    text = text.replace("::", ".").replace("#", ".").replace(" ", "")
    first, dot, rest = text.partition(".")
    if first not in roots:
        for distribution, root in distributions.items():
            if text == distribution or text.startswith(f"{distribution}."):
                return root + text[len(distribution) :]
        if first in CONVENTIONS:
            return CONVENTIONS[first] + dot + rest
    return text


def names_in(text: str) -> Iterator[str]:
    """Dotted names in a question in any language: Chinese text has no spaces around them."""
    for found in _DOTTED.finditer(text):
        if "." in found[0]:
            yield found[0]

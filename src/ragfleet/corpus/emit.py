"""Which definitions are public, under which paths, and the documents they become.

A public path has no component that begins with an underscore. Of a definition's paths the shortest
is its `path`, the others are aliases. Members of bases that have no public path of their own appear
under the public subclass or instance.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from ragfleet.corpus.docs import Docs
from ragfleet.corpus.document import CorpusType, Document, Source
from ragfleet.corpus.linker import Definition, Linker
from ragfleet.corpus.modules import Package

_SIGNATURE: Final = re.compile(r"[A-Za-z_][\w.]*\((?:[^()]|\([^()]*\))*\)")
_MAX_SOURCE_CHARS: Final = 100_000
_MAX_ALIASES: Final = 60


class Emitter:
    """Collects public paths, then yields documents in the order of their paths."""

    def __init__(self, package: Package, linker: Linker, docs: Docs) -> None:
        self._package, self._linker, self._docs = package, linker, docs
        self._paths: dict[int, dict[str, bool]] = defaultdict(dict)
        """id(definition) → path → whether it is listed in `__all__` (or defined right there)."""
        self._found: dict[int, Definition] = {}
        self._primary: dict[int, str] = {}

    def documents(
        self, package: str, version: str, corpus_type: CorpusType = "docstring"
    ) -> Iterator[Document]:
        self._collect()
        by_path: dict[str, Definition] = {}
        for key, found in self._found.items():
            # A function and its module may have one path; `pkg.solve(x)` means the function.
            other = by_path.get(self._primary[key])
            if other is None or other.kind == "module":
                by_path[self._primary[key]] = found
        for path in sorted(by_path):
            document = self._document(path, by_path[path], corpus_type)
            if document is not None:
                yield document.complete(package, version)

    # ---- which paths

    def _collect(self) -> None:
        for path in self._public_modules():
            module = self._linker.module(path)
            assert module is not None
            self._note(module, path, True)
            exported = self._linker.exported(path)
            for name in self._linker.namespace(path):
                if name.startswith("_"):
                    continue
                found = self._linker.lookup(path, name)
                if found is not None and found.kind != "module":
                    listed = name in exported if exported is not None else _is_home(found, path)
                    self._note(found, f"{path}.{name}", listed)
        # Members follow, once it is known which classes are public.
        holders = [found for found in self._found.values() if found.kind in ("class", "instance")]
        for holder in holders:
            self._choose(holder)
        for holder in holders:
            self._note_members(holder)
        for found in self._found.values():
            self._choose(found)

    def _public_modules(self) -> list[str]:
        paths = set(self._package.modules) | set(self._linker.added)
        roots = set(self._package.roots)
        return sorted(
            path
            for path in paths
            if path.partition(".")[0] in roots
            and not any(part.startswith("_") for part in path.split("."))
        )

    def _note(self, found: Definition, path: str, listed: bool) -> None:
        paths = self._paths[id(found)]
        paths[path] = paths.get(path, False) or listed
        self._found.setdefault(id(found), found)

    def _note_members(self, holder: Definition) -> None:
        cls = holder.instance_of if holder.kind == "instance" else holder
        assert cls is not None
        shortest = self._primary[id(holder)]
        seen: set[str] = set()
        for base in self._linker.mro(cls):
            own = base is holder
            public_path = self._primary.get(id(base))
            for name, member in base.members.items():
                if name.startswith("_") or name in seen:
                    continue
                seen.add(name)
                if own:
                    for path, listed in list(self._paths[id(holder)].items()):
                        self._note(member, f"{path}.{name}", listed)
                elif public_path is None or (
                    # DataFrame.head rather than core.generic.NDFrame.head.
                    holder.kind == "class" and shortest.count(".") < public_path.count(".")
                ):
                    self._note(member, f"{shortest}.{name}", True)
            if holder.kind == "instance" and public_path is not None:
                break  # its class is public: look-ups go there

    def _choose(self, found: Definition) -> None:
        paths = self._paths[id(found)]

        def rank(path: str) -> tuple[bool, int, int, int, str]:
            return (
                not paths[path],
                path.count("."),
                -_common(path, found.path),
                len(path),
                path,
            )

        # A listed path that is much deeper than an unlisted one is not what people write.
        best = min(paths, key=rank)
        shallow = min(paths, key=lambda path: (path.count("."), rank(path)))
        self._primary[id(found)] = best if best.count(".") <= shallow.count(".") + 1 else shallow

    # ---- what they say

    def _document(self, path: str, found: Definition, corpus_type: CorpusType) -> Document | None:
        doc = self._docs.of(found)
        signature = self._signature(found, doc)
        if corpus_type == "srccodes":
            doc = _source_code(found)
            if not doc:
                return None
        elif not doc and (not signature or found.kind not in ("function", "class")):
            return None
        aliases = sorted(
            (alias for alias in self._paths[id(found)] if alias != path),
            key=lambda alias: (alias.count("."), len(alias), alias),
        )
        cls = found.instance_of if found.kind == "instance" else found
        mro: list[str] = []
        if cls is not None and cls.kind == "class":
            public = [self._primary.get(id(base)) for base in self._linker.mro(cls)[1:]]
            mro = [base for base in public if base is not None]
        instance_of = None
        if found.instance_of is not None:
            instance_of = self._primary.get(id(found.instance_of), found.instance_of.path)
        return Document(
            path=path,
            doc=doc,
            aliases=aliases[:_MAX_ALIASES],
            kind="method" if found.kind == "function" and found.owner else found.kind,
            signature=signature,
            defined_in=found.path,
            instance_of=instance_of,
            mro=mro,
            source=_source_of(found),
        )

    def _signature(self, found: Definition, doc: str) -> str:
        if found.kind == "module":
            return ""
        tree, name = found.tree, found.name
        if found.kind == "class":
            init = self._linker.member(found, "__init__") or self._linker.member(found, "__new__")
            tree = init.tree if init is not None else None
        first = doc.partition("\n")[0].strip()
        if tree is not None and tree.is_function:
            parameters = _parameters(tree, bound=found.owner is not None or found.kind == "class")
            # `plot(*args, **kwargs)` says less than a first line that spells the arguments out.
            if not (parameters == "*args, **kwargs" and _names(first, name)):
                return f"{name}({parameters})"
        found_signature = _SIGNATURE.match(first)
        return found_signature[0] if found_signature is not None and _names(first, name) else ""


def _names(first: str, name: str) -> bool:
    matched = _SIGNATURE.match(first)
    return matched is not None and matched[0].partition("(")[0].rpartition(".")[2] == name


def _parameters(tree: object, bound: bool) -> str:
    parts: list[str] = []
    seen_star = positional_only = False
    parameters = list(tree.parameters)  # type: ignore[attr-defined]
    if bound and parameters and parameters[0].name in ("self", "cls", "mcs"):
        parameters = parameters[1:]
    for parameter in parameters:
        kind = "" if parameter.kind is None else parameter.kind.value
        if kind == "positional-only":
            positional_only = True
        elif positional_only:
            parts.append("/")
            positional_only = False
        if kind == "keyword-only" and not seen_star:
            parts.append("*")
            seen_star = True
        text = parameter.name
        if kind == "variadic positional":
            text, seen_star = f"*{text}", True
        elif kind == "variadic keyword":
            text = f"**{text}"
        elif parameter.default is not None:
            default = str(parameter.default)
            text += f"={default if len(default) <= 80 else '...'}"
        parts.append(text)
    if positional_only:
        parts.append("/")
    return ", ".join(parts)


def _source_code(found: Definition) -> str:
    if found.tree is None or found.module is None or found.kind not in ("function", "class"):
        return ""
    if found.module.source != "py" or not found.tree.lineno or not found.tree.endlineno:
        return ""
    lines = found.module.text.splitlines()
    first = found.tree.lineno
    decorators = getattr(found.tree, "decorators", None) or []
    first = min([first, *(decorator.lineno or first for decorator in decorators)])
    return "\n".join(lines[first - 1 : found.tree.endlineno])[:_MAX_SOURCE_CHARS]


def _source_of(found: Definition) -> Source:
    return "c-ext" if found.module is None or found.tree is None else found.module.source


def _is_home(found: Definition, module: str) -> bool:
    """Without `__all__`: what is defined below this module is its own, other imports are not."""
    return found.path.startswith(f"{module}.")


def _common(left: str, right: str) -> int:
    count = 0
    for a, b in zip(left.split("."), right.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count

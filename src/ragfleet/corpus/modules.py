"""A package's modules: which files they are, and griffe's reading of each.

griffe parses; it never imports (no inspection). Files are read one by one, so that one which can't
be parsed costs itself and not its package. How names of modules lead to one another is the
linker's business.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import griffe

from ragfleet.corpus.stubs import cython_to_python, python2_to_python3

_SKIPPED_FOLDERS: Final = frozenset({"tests", "test"})
_NOT_ROOTS: Final = frozenset(
    {"setup", "versioneer", "conftest", "setupext", "runtests", "site", "tests", "test"}
    | {"benchmarks", "examples", "doc", "docs", "tools", "build"}
)
_BINARY: Final = re.compile(r"\.(?:so|pyd|dylib)$")
ModuleSource = Literal["py", "pyi", "pyx"]


@dataclass
class Module:
    """One parsed module. `stub` is its .pyi, where it has both."""

    path: str
    file: Path
    source: ModuleSource
    text: str
    tree: Any
    syntax: ast.Module
    stub: Any = None

    @property
    def is_package(self) -> bool:
        return self.file.stem == "__init__"


@dataclass
class Package:
    """Everything of one version that could be read."""

    roots: list[str]
    modules: dict[str, Module] = field(default_factory=dict)
    compiled: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    """File → why it could not be parsed."""
    extra: list[tuple[Path, ast.Module]] = field(default_factory=list)
    """Files outside the package that add docstrings to it (numpy's code generators)."""


def find_roots(names: Iterable[str], kind: str) -> dict[str, str]:
    """Import roots among an archive's names: root → the folder that holds it.

    A wheel has them at its top; in an sdist they are the outermost packages.
    """
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda text: (text.count("/"), text)):
        folder, _, file = name.rpartition("/")
        parts = folder.split("/") if folder else []
        if file in ("__init__.py", "__init__.pyi") and parts:
            root, base = parts[-1], parts[:-1]
        elif file.endswith(".py") and (not parts if kind == "wheel" else len(parts) == 1):
            root, base = file[:-3], parts
        else:
            continue
        allowed = not base if kind == "wheel" else len(base) <= 3 and base[1:] in ([], *_SRC)
        if allowed and root.isidentifier() and root not in _NOT_ROOTS:
            found.setdefault(root, "/".join(base))
    return found


_SRC: Final = (["src"], ["lib"], ["python"], ["lib3"])


class ModuleReader:
    """Reads the files of one version into a Package, wheel first, then what the sdist adds."""

    def __init__(self, on_file: Callable[[], None] | None = None) -> None:
        self.package = Package([])
        self._on_file = on_file or (lambda: None)

    def add_wheel(self, folder: Path, files: list[Path], names: list[str]) -> None:
        roots = find_roots(names, "wheel")
        self.package.roots += [root for root in roots if root not in self.package.roots]
        for name in names:
            if _BINARY.search(name) and name.partition("/")[0] in roots:
                self.package.compiled.add(_module_path(name.split("/")))
        self._add_sources(folder, files, dict.fromkeys(roots, folder))

    def add_sdist(self, folder: Path, files: list[Path], names: list[str]) -> None:
        roots = find_roots(names, "sdist")
        if self.package.roots:
            roots = {root: base for root, base in roots.items() if root in self.package.roots}
        else:
            self.package.roots += _main_roots(roots, names)
            roots = {root: roots[root] for root in self.package.roots}
        bases = {root: folder / base for root, base in roots.items()}
        wheel_had_sources = bool(self.package.modules)
        wanted = (".pyx", ".pyi") if wheel_had_sources else (".py", ".pyi", ".pyx")
        self._add_sources(folder, [path for path in files if path.suffix in wanted], bases)
        known = {module.path for module in self.package.modules.values()}
        for path in files:
            self._add_extra(path, bases, known)

    def _add_extra(self, path: Path, bases: dict[str, Path], known: set[str]) -> None:
        """A file that is in no package but documents its C functions."""
        if path.suffix != ".py" or "tests" in path.parts:
            return
        for root, base in bases.items():
            if path.is_relative_to(base / root):
                inside = _module_path(path.relative_to(base).parts)
                if inside in known:
                    return
                try:
                    text = path.read_text(encoding="utf-8-sig")
                    if "newdoc" in text:
                        self.package.extra.append((path, ast.parse(text)))
                except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
                    return

    def _add_sources(self, folder: Path, files: list[Path], bases: dict[str, Path]) -> None:
        todo = []
        for path in files:
            for root, base in bases.items():
                inside = path.relative_to(base) if path.is_relative_to(base) else None
                if inside is None or inside.parts[0] not in (root, f"{root}.py", f"{root}.pyi"):
                    continue
                is_test = inside.name == "conftest.py" or set(inside.parts[1:-1]) & _SKIPPED_FOLDERS
                if not is_test:
                    todo.append((path, inside))
                break
        # Packages before their modules: a module needs its parent to resolve relative imports.
        order = {".py": 0, ".pyi": 1, ".pyx": 2, ".pxi": 3}
        todo.sort(key=lambda item: (order[item[0].suffix], len(item[1].parts), not _is_init(item)))
        for path, inside in todo:
            self._add(path, inside, folder)
            self._on_file()

    def _add(self, path: Path, inside: Path, folder: Path) -> None:
        module_path = _module_path(inside.parts)
        if path.suffix == ".pyx":
            module_path = self._compiled_path(module_path)
        if path.suffix == ".pxi" or not all(part.isidentifier() for part in module_path.split(".")):
            return
        present = self.package.modules.get(module_path)
        try:
            text, syntax = _parse(path)
            tree = self._visit(module_path, path, text)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if present is None:
                name = path.relative_to(folder).as_posix()
                self.package.failures[name] = f"{type(error).__name__}: {error}"[:300]
            return
        if present is not None:
            if path.suffix == ".pyi":
                present.stub = tree
            return
        source: ModuleSource = "py" if path.suffix == ".py" else "pyi"
        if path.suffix == ".pyx":
            source = "pyx"
        self.package.modules[module_path] = Module(module_path, path, source, text, tree, syntax)

    def _compiled_path(self, path: str) -> str:
        """numpy/random/mtrand/mtrand.pyx is numpy.random.mtrand: the wheel tells which exist."""
        compiled = self.package.compiled
        if path in compiled:
            return path
        stem = path.rpartition(".")[2]
        same = [name for name in compiled if name.rpartition(".")[2] == stem]
        same = [name for name in same if path.startswith(name.rpartition(".")[0])]
        return max(same, key=len) if same else path

    def _visit(self, module_path: str, path: Path, text: str) -> Any:
        parent_path, _, name = module_path.rpartition(".")
        parent = self._parent(parent_path)
        return griffe.visit(
            name,
            filepath=path,
            code=text,
            parent=parent,
            modules_collection=_NO_MODULES,
            lines_collection=_NO_LINES,
        )

    def _parent(self, path: str) -> Any:
        if not path:
            return None
        if path in self.package.modules:
            return self.package.modules[path].tree
        above, _, name = path.rpartition(".")
        return griffe.Module(name, filepath=Path(f"{name}/__init__.py"), parent=self._parent(above))


_NO_MODULES: Final = griffe.ModulesCollection()
_NO_LINES: Final = griffe.LinesCollection()


def _parse(path: Path) -> tuple[str, ast.Module]:
    data = path.read_bytes()
    text = _decode(data)
    if path.suffix == ".pyx":
        text = cython_to_python(text)
    try:
        return text, ast.parse(text)
    except (SyntaxError, ValueError):
        if path.suffix != ".py":
            raise
        text = python2_to_python3(text)
        return text, ast.parse(text)


def _decode(data: bytes) -> str:
    declared = re.match(rb"(?:[^\n]*\n)?[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", data[:400])
    names = ["utf-8-sig", *([declared[1].decode("ascii")] if declared else []), "latin-1"]
    for name in names:
        try:
            text = data.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
        return text.replace("\r\n", "\n").replace("\f", "\n")
    raise ValueError("not text")


def _module_path(parts: Iterable[str]) -> str:
    *folders, file = parts
    stem = file.split(".")[0]
    return ".".join(folders if stem == "__init__" else [*folders, stem])


def _is_init(item: tuple[Path, Path]) -> bool:
    return item[0].stem == "__init__"


def _main_roots(roots: dict[str, str], names: list[str]) -> list[str]:
    """An sdist's own packages: those with the shortest base, and not its scripts beside them."""
    packages = {
        root
        for root, base in roots.items()
        if any(name.startswith(f"{base}/{root}/" if base else f"{root}/") for name in names)
    }
    return [root for root in roots if root in packages] or list(roots)

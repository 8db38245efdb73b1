"""Documentation blocks from released wheels, read without running any of their code.

Owns the list of packages (and which of them are held out), fetching the wheels with the
ordinary installer, and the walk over their syntax trees. Knows nothing of questions or models.
"""

from __future__ import annotations

import ast
import email
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# name, version, licence; fixed, so that a run can be repeated.
TRAINING = (
    ("aiohttp", "3.14.5", "Apache-2.0 and MIT"),
    ("astropy", "8.0.2", "BSD-3-Clause"),
    ("bokeh", "3.9.2", "BSD-3-Clause"),
    ("click", "8.5.1", "BSD-3-Clause"),
    ("dask", "2026.8.0", "BSD-3-Clause"),
    ("flask", "3.1.3", "BSD-3-Clause"),
    ("httpx", "0.28.1", "BSD-3-Clause"),
    ("jinja2", "3.1.6", "BSD-3-Clause"),
    ("networkx", "3.6.1", "BSD-3-Clause"),
    ("nltk", "3.10.4", "Apache-2.0"),
    ("pillow", "13.0.0", "MIT-CMU"),
    ("rich", "15.0.0", "MIT"),
    ("scikit-image", "0.26.0", "BSD-3-Clause"),
    ("scikit-learn", "1.9.1", "BSD-3-Clause"),
    ("seaborn", "0.13.2", "BSD-3-Clause"),
    ("sqlalchemy", "2.1.9", "MIT"),
    ("statsmodels", "0.15.0", "BSD-3-Clause"),
    ("sympy", "1.14.0", "BSD-3-Clause"),
    ("werkzeug", "3.1.9", "BSD-3-Clause"),
    ("xarray", "2026.9.0", "Apache-2.0"),
)
HELD_OUT = (
    ("numpy", "1.16.6", "BSD-3-Clause"),
    ("scipy", "1.4.1", "BSD-3-Clause"),
    ("matplotlib", "2.0.2", "Matplotlib licence (PSF-based)"),
    ("requests", "2.31.0", "Apache-2.0"),
)
# Old releases have wheels for old interpreters only; they are read here, never installed.
INTERPRETERS = {"numpy": "3.7", "scipy": "3.7", "matplotlib": "3.6"}
MAX_DOC_CHARS = 6000
SKIPPED_FOLDERS = {"tests", "testing", "test", "conftest", "setup", "externals", "vendored"}


@dataclass(frozen=True)
class Block:
    """One documented name, shaped as ragfleet's contexts show it."""

    path: str
    package: str
    version: str
    signature: str
    typed_signature: str
    doc: str

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


def fetch(wheels: Path) -> None:
    """Download every wheel that `wheels` lacks. Wheels only: building an sdist runs its code."""
    wheels.mkdir(parents=True, exist_ok=True)
    for name, version, _ in TRAINING + HELD_OUT:
        if wheel_of(wheels, name, version) is not None:
            continue
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(wheels), f"{name}=={version}"]
        if name in INTERPRETERS:
            command += ["--python-version", INTERPRETERS[name]]
            command += ["--platform", "manylinux1_x86_64"]
        subprocess.run(command, check=True)


def wheel_of(wheels: Path, name: str, version: str) -> Path | None:
    """The wheel of `name==version` in `wheels`, if it is there."""
    found = sorted(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found else None


def declared_licence(wheel: Path) -> str:
    """What a wheel's metadata says of its licence: expression, free text and classifiers."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    said = [metadata.get("License-Expression"), metadata.get("License")]
    said += [c for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    return "\n".join(text for text in said if text)


def check_licence(wheel: Path, package: str, licence: str) -> None:
    """Raise ValueError unless the wheel declares the licence this module lists it under.

    Older metadata names the family only ("BSD License"), or nothing beyond "OSI Approved".
    """
    declared = declared_licence(wheel)
    families = [family for family in ("BSD", "Apache", "MIT", "PSF") if family in licence]
    named = declared.replace("Python Software Foundation", "PSF")
    if not families or not all(family in named for family in families):
        raise ValueError(f"{package} is listed under {licence}, its wheel says: {declared!r}")


def signature_of(name: str, arguments: ast.arguments, typed: bool, drop_first: bool) -> str:
    """`name(a, b=1, *args)` as the source writes its defaults; `drop_first` leaves out `self`."""
    parts: list[str] = []

    def shown(argument: ast.arg, default: ast.expr | None, star: str = "") -> str:
        text = star + argument.arg
        annotated = typed and argument.annotation is not None
        if annotated and argument.annotation is not None:
            text += f": {ast.unparse(argument.annotation)}"
        if default is not None:
            text += f" = {ast.unparse(default)}" if annotated else f"={ast.unparse(default)}"
        return text

    positional = arguments.posonlyargs + arguments.args
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = missing + list(arguments.defaults)
    for index, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        parts.append(shown(argument, default))
        if arguments.posonlyargs and index == len(arguments.posonlyargs) - 1:
            parts.append("/")
    if drop_first:
        parts = parts[1:]
    if arguments.vararg:
        parts.append(shown(arguments.vararg, None, "*"))
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(shown(argument, default))
    if arguments.kwarg:
        parts.append(shown(arguments.kwarg, None, "**"))
    return f"{name}({', '.join(parts)})"


def callables(tree: ast.Module) -> Iterator[tuple[str, ast.arguments | None, bool, str]]:
    """Public documented names: dotted name in the module, arguments, drop `self`?, docstring."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node) or ""
        if node.name.startswith("_"):
            continue
        if not isinstance(node, ast.ClassDef):
            yield node.name, node.args, False, doc
            continue
        init: ast.arguments | None = None
        for member in node.body:
            if not isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if member.name == "__init__":
                init = member.args
            elif not member.name.startswith("_"):
                member_doc = ast.get_docstring(member) or ""
                yield f"{node.name}.{member.name}", member.args, False, member_doc
        yield node.name, init, True, doc


def blocks_of(wheel: Path, package: str, version: str) -> Iterator[Block]:
    """Every documented public function, method and class of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in sorted(archive.namelist()):
            parts = entry.removesuffix(".py").split("/")
            if not entry.endswith(".py") or SKIPPED_FOLDERS & set(parts) or "test_" in entry:
                continue
            module = [part for part in parts if not part.startswith("_")]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(archive.read(entry))
            except (SyntaxError, ValueError):  # Python 2 leftovers in old releases
                continue
            for name, arguments, drop, doc in callables(tree):
                if len(doc) < 15 or not module:
                    continue
                last = name.rsplit(".", 1)[-1]
                plain = f"{last}(...)"
                typed = plain
                if arguments is not None:
                    plain = signature_of(last, arguments, False, drop)
                    typed = signature_of(last, arguments, True, drop)
                path = ".".join([*module, name])
                yield Block(path, package, version, plain, typed, doc[:MAX_DOC_CHARS].rstrip())


def extract(wheels: Path, out: Path) -> dict[str, int]:
    """Write `training.jsonl` and `held_out.jsonl` to `out`; block counts by package.

    A training block that shares its docstring's first line with a held-out one is dropped:
    packages copy each other's documentation.

    Raises:
        FileNotFoundError: a wheel is missing.
        ValueError: a wheel declares another licence than this module lists.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    seen: set[str] = set()
    held_out_lines: set[str] = set()
    for file_name, packages in (("held_out.jsonl", HELD_OUT), ("training.jsonl", TRAINING)):
        with (out / file_name).open("w", encoding="utf-8") as file:
            for package, version, licence in packages:
                wheel = wheel_of(wheels, package, version)
                if wheel is None:
                    raise FileNotFoundError(f"no wheel of {package}=={version} in {wheels}")
                check_licence(wheel, package, licence)
                counts[package] = 0
                for block in blocks_of(wheel, package, version):
                    first_line = block.doc.split("\n", 1)[0].strip()
                    if file_name == "held_out.jsonl":
                        held_out_lines.add(first_line)
                    elif first_line in held_out_lines:
                        continue
                    key = block.name + block.doc
                    if key in seen:
                        continue
                    seen.add(key)
                    counts[package] += 1
                    file.write(json.dumps(asdict(block)) + "\n")
    return counts


def load(path: Path) -> list[Block]:
    """The blocks of a file that `extract` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Block(**json.loads(line)) for line in file]

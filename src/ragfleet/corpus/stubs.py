"""Sources that today's Python can't parse, rewritten as sources it can.

Cython: declarations become plain `class` and `def` with their docstrings; bodies are dropped.
Python 2: lib2to3's successor rewrites statements; names and docstrings stay as they are. Both work
on text alone.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any, Final

_BLOCK: Final = re.compile(
    r"^(?P<indent>[ \t]*)(?:(?P<cdef>cdef|cpdef)\s+)?"
    r"(?:(?:public|readonly|inline|api)\s+)*(?P<word>class|def)?\b"
)
_CPDEF: Final = re.compile(
    r"^(?P<indent>[ \t]*)cpdef\s+(?!class\b|enum\b)[^=(]*?(?P<name>\w+)\s*\("
)
_DEF: Final = re.compile(r"^(?P<indent>[ \t]*)def\s+(?P<name>\w+)\s*\(")
_CLASS: Final = re.compile(
    r"^(?P<indent>[ \t]*)(?:cdef\s+)?(?:(?:public|api)\s+)?class\s+(?P<name>\w+)"
    r"(?:\s*\((?P<bases>[^)]*)\))?"
)
_ASSIGNED: Final = re.compile(r"^[A-Za-z_]\w*\s*=\s*[A-Za-z_][\w.]*(\(\))?\s*(#.*)?$")
_IMPORT: Final = re.compile(r"^(from\s+[\w.]+\s+)?import\s+[\w.*, ]+(\s*#.*)?$")
_ARGUMENT_NAME: Final = re.compile(r"(\*{0,2}\s*\w+)\s*(?:not\s+None|or\s+None)?\s*$")
_SUBSCRIPT: Final = re.compile(r"\[[^\]]*\]")
_STRING: Final = re.compile(r'[rRbBuU]{0,2}("""|\'\'\'|"|\')')


def cython_to_python(source: str) -> str:
    """The classes, functions and docstrings of a .pyx file, and its plain top-level assignments."""
    lines = source.splitlines()
    out: list[str] = []
    number = 0
    decorators: list[str] = []
    while number < len(lines):
        line = lines[number]
        stripped = line.strip()
        indent = line[: len(line) - len(line.lstrip())].expandtabs(8)
        if stripped.startswith("@"):
            decorators = [*decorators, f"{indent}{stripped}"]
            number += 1
            continue
        found = _DEF.match(line) or _CPDEF.match(line)
        if found:
            header, number = _until_colon(lines, number)
            name = found["name"]
            arguments = _arguments(header[header.index("(", header.index(name)) + 1 :])
            doc, number = _docstring(lines, number)
            kept = [text for text in decorators if re.search(r"property|staticm|classm", text)]
            out += [*kept, f"{indent}def {name}({arguments}):", f"{indent}    {doc or 'pass'}"]
            if doc:
                out.append(f"{indent}    pass")
        elif found := _CLASS.match(line):
            _, number = _until_colon(lines, number)
            doc, number = _docstring(lines, number)
            bases = found["bases"] or ""
            out += [f"{indent}class {found['name']}({bases}):", f"{indent}    {doc or 'pass'}"]
        else:
            if not indent and (_ASSIGNED.match(line) or _IMPORT.match(line)):
                out.append(line)
            number = _after_string(lines, number)
        decorators = []
    return "\n".join(out) + "\n"


def _until_colon(lines: list[str], number: int) -> tuple[str, int]:
    """The logical line of a header, and the number of the line after it."""
    text, depth = "", 0
    while number < len(lines):
        line = lines[number].split("#")[0]
        text += " " + line.strip()
        depth += sum(line.count(char) for char in "([{") - sum(line.count(char) for char in ")]}")
        number += 1
        if depth <= 0 and not line.rstrip().endswith("\\"):
            break
    return text, number


def _arguments(text: str) -> str:
    """Names and defaults, in Python's order, without C types."""
    depth, parts, current = 0, [], ""
    for char in text:
        if char in ")]}" and depth == 0:
            break
        depth += char in "([{"
        depth -= char in ")]}"
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    parts.append(current)
    arguments = []
    for part in parts:
        declared = _SUBSCRIPT.sub("", part, count=1) if "[" in part.split("=")[0] else part
        name, equals, default = declared.partition("=")
        found = _ARGUMENT_NAME.search(name.split(":")[0].strip())
        if found is None:
            continue
        shown = found[1].replace(" ", "")
        arguments.append(shown + (f"={default.strip()}" if equals else ""))
    text = ", ".join(arguments)
    try:
        ast.parse(f"def f({text}): pass")
    except (SyntaxError, ValueError):
        return ", ".join(argument.partition("=")[0] for argument in arguments)
    return text


def _docstring(lines: list[str], number: int) -> tuple[str | None, int]:
    first = number
    while first < len(lines) and (not lines[first].strip() or lines[first].strip()[0] == "#"):
        first += 1
    if first == len(lines) or not _STRING.match(lines[first].strip()):
        return None, number
    end = _after_string(lines, first)
    text = "\n".join(lines[first:end]).strip()
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None, end
    return (repr(value) if isinstance(value, str) else None), end


def _after_string(lines: list[str], number: int) -> int:
    """The line after this one, or after the triple-quoted string that begins in it."""
    line = lines[number]
    for quote in ('"""', "'''"):
        if line.count(quote) % 2:
            for end in range(number + 1, len(lines)):
                if quote in lines[end]:
                    return end + 1
            return len(lines)
    return number + 1


def python2_to_python3(source: str) -> str:
    """Raises ValueError when it is no Python 2 either."""
    tool = _refactoring()
    try:
        return str(tool.refactor_string(source + "\n", "source"))
    except Exception as error:  # fissix raises its parser's and tokenizer's own errors
        raise ValueError(f"neither Python 3 nor Python 2: {error}") from error


@cache
def _refactoring() -> Any:
    from fissix.refactor import RefactoringTool

    fixers = ("except", "exec", "print", "raise", "repr", "ne", "numliterals", "tuple_params")
    return RefactoringTool([f"fissix.fixes.fix_{name}" for name in fixers])

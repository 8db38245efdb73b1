"""Finding and importing a user's class: `file.py:ClassName`.

Owns the early check, which reads the file without running it, and the import, which belongs into a
worker after its GPUs are set: a user's file may import torch at its top.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TypeVar

from ragfleet.errors import ConfigError

_Base = TypeVar("_Base")


def split_reference(reference: str) -> tuple[Path, str]:
    """(file, class name) of `file.py:ClassName`; the file exists."""
    name, colon, cls = reference.rpartition(":")
    if not colon or not name.endswith(".py") or not cls.isidentifier():
        raise ConfigError(f"--inference_class is {reference!r}; it must be file.py:ClassName.")
    file = Path(name).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"--inference_class {reference}: there is no file {file}.")
    return file, cls


def check_class(reference: str) -> str | None:
    """The class's `version`, read without running the file.

    Raises ConfigError where the file does not parse or never binds the name. Whether it is a proper
    subclass shows only when a worker imports it.
    """
    file, name = split_reference(reference)
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{file}:{line}: not valid Python: {error}") from None
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if name in classes:
        return _version(classes[name], file)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    bound |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    if name not in bound:
        raise ConfigError(_no_such_class(file, name, list(classes)))
    return None


def load_class(reference: str, base: type[_Base]) -> type[_Base]:
    """The class itself, imported. Raises ConfigError with the user's own file and line."""
    file, name = split_reference(reference)
    # As `python file.py` would: modules beside the file can be imported.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    # An own name, so that it hides no installed module of the same name, and not __main__, so that
    # `if __name__ == "__main__"` stays quiet.
    module_name = f"ragfleet_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file can raise anything
        del sys.modules[module_name]
        raise ConfigError(
            f"--inference_class {reference}: the file fails when imported: {describe(error, file)}"
        ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(_no_such_class(file, name, classes))
    if not issubclass(found, base):
        raise ConfigError(
            f"--inference_class {reference}: {name} is not a subclass of {base.__name__};"
            f" write `class {name}({base.__name__}):` with"
            f" `from ragfleet import {base.__name__}`."
        )
    return found


def describe(error: BaseException, file: Path) -> str:
    """Type, message and the last place in the user's own file."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{message} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    return f"{message} ({file}:{own[-1].lineno})" if own else message


def _version(node: ast.ClassDef, file: Path) -> str | None:
    for statement in node.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if not any(isinstance(target, ast.Name) and target.id == "version" for target in targets):
            continue
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, (str, int, float)):
            return str(value.value)
        raise ConfigError(
            f"{file}:{statement.lineno}: version must be a plain string or number, because it is"
            " read without running the file."
        )
    return None


def _no_such_class(file: Path, name: str, classes: list[str]) -> str:
    near = difflib.get_close_matches(name, classes, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" It has: {', '.join(classes) or 'none'}."
    return f"--inference_class: {file} has no class {name}.{hint}"

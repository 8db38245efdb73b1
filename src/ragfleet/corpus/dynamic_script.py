"""Import one package and write what it documents, as JSON lines on stdout.

Runs in the interpreter of a throw-away environment, which may be an old one: only syntax and
modules that Python 2.7 has too. Nothing of ragfleet can be imported here.
"""

import importlib
import inspect
import io
import json
import pkgutil
import sys
import types
import warnings

MAX_PARTS = 4


def hidden(path):
    return any(
        part.startswith("_") or part in ("tests", "test", "conftest", "setup")
        for part in path.split(".")
    )


def modules_of(root):
    found = {root: importlib.import_module(root)}
    walk = (
        pkgutil.walk_packages(found[root].__path__, root + ".", onerror=lambda name: None)
        if hasattr(found[root], "__path__")
        else ()
    )
    for item in walk:
        name = item[1]
        if hidden(name) or name.count(".") >= MAX_PARTS - 1:
            continue
        try:
            found[name] = importlib.import_module(name)
        except BaseException:  # a module may do anything when imported, exit included
            continue
    return found


def document(value):
    try:
        doc = inspect.getdoc(value)
    except Exception:  # __doc__ may be a property of the package's own
        return None
    return doc if hasattr(doc, "strip") else None


def signature(value, name):
    try:
        return name + str(inspect.signature(value))
    except Exception:  # builtins have none, and __signature__ may be anything
        return ""


def is_own(value, root):
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", None)
    return str(module).split(".")[0] == root or type(value).__name__ in ("ufunc",)


def rows(root):
    for module_name, module in sorted(modules_of(root).items()):
        for name in dir(module):
            if name.startswith("_"):
                continue
            value = getattr(module, name, None)
            if isinstance(value, types.ModuleType) or not callable(value):
                continue
            if not is_own(value, root) and not isinstance(value, types.BuiltinFunctionType):
                continue
            path = module_name + "." + name
            kind = "class" if isinstance(value, type) else "function"
            yield path, kind, value, name
            if kind == "class":
                for member in dir(value):
                    if not member.startswith("_"):
                        inner = getattr(value, member, None)
                        if callable(inner) and is_own(inner, root):
                            yield path + "." + member, "method", inner, member


def main():
    warnings.simplefilter("ignore")
    out = io.open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115
    for path, kind, value, name in rows(sys.argv[1]):
        doc = document(value)
        if doc and doc.strip():
            row = {"path": path, "kind": kind, "doc": doc, "signature": signature(value, name)}
            out.write(json.dumps(row).encode("utf-8") + b"\n")


if __name__ == "__main__":
    main()

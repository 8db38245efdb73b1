"""What an import of a package documents, as JSON lines; run by corpus_coverage.py.

Runs in old interpreters, so only what Python 3.5 has too. A line is a public path of at most three
components whose value has a docstring, and whether its class defines it itself (`own`).
"""

import importlib
import inspect
import json
import pkgutil
import sys
import types
import warnings

SKIPPED = {"tests", "test", "testing", "setup", "conftest", "distutils", "f2py", "compat"}
VALUES = (int, float, complex, str, bytes, list, dict, tuple, set, frozenset, type(None))


def hidden(path):
    return any(part.startswith("_") or part in SKIPPED for part in path.split(".")[1:])


def doc_of(value):
    try:
        doc = inspect.getdoc(value)
    except Exception:
        return None
    return doc if isinstance(doc, str) and doc.strip() else None


def is_from(value, root):
    name = type(value).__name__
    if name == "ufunc":
        return root == "numpy"
    module = getattr(value, "__module__", None)
    if module is None:
        return isinstance(value, types.BuiltinFunctionType) and root == "numpy"
    return str(module).split(".")[0] in (root, "mtrand")


def main(root):
    warnings.simplefilter("ignore")
    if root == "matplotlib":
        importlib.import_module("matplotlib").use("Agg")
    modules = {root: importlib.import_module(root)}
    for item in pkgutil.walk_packages(
        modules[root].__path__, root + ".", onerror=lambda name: None
    ):
        if item[1].count(".") == 1 and not hidden(item[1]):
            try:
                modules[item[1]] = importlib.import_module(item[1])
            except BaseException:  # a module may do anything when imported
                continue
    found = {}
    for module_name, module in modules.items():
        for name in dir(module):
            value = getattr(module, name, None)
            path = module_name + "." + name
            if name.startswith("_") or isinstance(value, (types.ModuleType, *VALUES)):
                continue
            # An instance that can't be called has its class's text: that documents the class.
            if not callable(value) or not is_from(value, root) or not doc_of(value):
                continue
            found[path] = (True, doc_of(value))
            if isinstance(value, type) and path.count(".") < 2:
                for member, own, text in members(value, root):
                    found[path + "." + member] = (own, text)
    for path in sorted(found):
        own, text = found[path]
        print(json.dumps({"path": path, "own": own, "doc": text[:200]}))


def members(cls, root):
    for name in dir(cls):
        holder = next((base for base in cls.__mro__ if name in base.__dict__), None)
        if name.startswith("_") or holder is None:
            continue
        if str(holder.__module__).split(".")[0] not in (root, "mtrand"):
            continue
        raw = holder.__dict__[name]
        value = getattr(cls, name, None)
        kind = type(raw).__name__
        if callable(value) or isinstance(raw, property) or kind == "getset_descriptor":
            text = doc_of(value) if callable(value) else doc_of(raw)
            if text:
                yield name, holder is cls, text


if __name__ == "__main__":
    main(sys.argv[1])

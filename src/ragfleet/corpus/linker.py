"""From names to definitions: imports, wildcards, aliases, instances, class members, bases.

Owns the namespaces of a package's modules, resolved lazily and without running anything. griffe's
own loader keeps a function and a submodule of the same name in one slot; here they are two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ragfleet.corpus.exports import Exports, find_exports
from ragfleet.corpus.modules import Module, Package

Kind = Literal["module", "class", "function", "attribute", "instance"]
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_CALL: Final = re.compile(r"([A-Za-z_][\w.]*)\((.*)\)", re.DOTALL)
_MAX_HOPS: Final = 40


@dataclass(eq=False)
class Definition:
    """One thing, at the place that defines it. `tree` is griffe's object, None for C."""

    path: str
    kind: Kind
    module: Module | None
    tree: Any = None
    owner: Definition | None = None
    instance_of: Definition | None = None
    members: dict[str, Definition] = field(default_factory=dict)
    doc: str | None = None
    """Docstring that another file gives it (add_newdoc)."""
    bases: list[Definition] = field(default_factory=list)
    """Of a class that C code makes; others have theirs in `tree`."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Binding:
    """A name in a module: something defined there (`tree`), or imported from `target`."""

    tree: Any = None
    target: str | None = None


class Linker:
    """Resolves names within one package version."""

    def __init__(self, package: Package) -> None:
        self.modules = package.modules
        self.added: dict[str, dict[str, Definition]] = {}
        """Place → name → what `add_newdoc` documents there."""
        self._namespaces: dict[str, dict[str, Binding]] = {}
        self._definitions: dict[tuple[str, str], Definition | None] = {}
        self._modules: dict[str, Definition] = {}
        self._exports: dict[str, Exports | None] = {
            path: find_exports(module.syntax) for path, module in package.modules.items()
        }
        self._mros: dict[int, list[Definition]] = {}

    # ---- modules

    def namespace(self, path: str) -> dict[str, Binding]:
        """Every name of a module, in the order in which it is bound; later ones win."""
        found = self._namespaces.get(path)
        if found is not None:
            return found
        names: dict[str, Binding] = {}
        self._namespaces[path] = names  # in place: a cycle of wildcards sees what is there so far
        module = self.modules.get(path)
        if module is not None:
            for tree in (module.tree, module.stub):
                if tree is None:
                    continue
                for _line, name, binding in sorted(_bindings(tree), key=lambda item: item[0]):
                    if name == "*":
                        assert binding.target is not None
                        for public in self.public_names(binding.target):
                            self._bind(names, public, Binding(target=f"{binding.target}.{public}"))
                    elif tree is module.tree or name not in names:
                        self._bind(names, name, binding)
        for name in self.added.get(path, ()):
            names.setdefault(name, Binding())
        return names

    @staticmethod
    def _bind(names: dict[str, Binding], name: str, binding: Binding) -> None:
        names.pop(name, None)
        names[name] = binding

    def public_names(self, path: str) -> list[str]:
        """What `from path import *` brings."""
        names = self.namespace(path)
        exports = self._exports.get(path)
        listed = None if exports is None else self._listed(path, exports)
        if listed is None:
            return [name for name in names if not name.startswith("_")]
        return [name for name in dict.fromkeys([*names, *sorted(listed)]) if name in listed]

    def exported(self, path: str) -> set[str] | None:
        """The names in `__all__`; None without one, or where it can't be told."""
        exports = self._exports.get(path)
        return None if exports is None else self._listed(path, exports)

    def _listed(self, path: str, exports: Exports) -> set[str] | None:
        if exports.open:
            return None
        listed = set(exports.names)
        for text in exports.modules:
            found = self.expression(path, text)
            if found is None or found.kind != "module" or found.path == path:
                continue
            listed |= set(self.public_names(found.path))
        return listed - exports.removed

    # ---- names

    def lookup(self, path: str, name: str) -> Definition | None:
        """The definition that `name` means in module `path`."""
        key = (path, name)
        if key in self._definitions:
            return self._definitions[key]
        self._definitions[key] = None  # a cycle ends here
        found = self._lookup(path, name)
        self._definitions[key] = found
        return found

    def _lookup(self, path: str, name: str) -> Definition | None:
        binding = self.namespace(path).get(name)
        added = self.added.get(path, {}).get(name)
        if binding is not None:
            found = None
            if binding.target is not None:
                found = self.imported(binding.target)
            elif binding.tree is not None:
                found = self._define(self.modules[path], binding.tree, f"{path}.{name}")
            if found is not None:
                if added is not None and added.kind == "class" and found.kind == "attribute":
                    return added  # `generic = allTypes['generic']`: a class made by C code
                if added is not None and found is not added and found.kind != "module":
                    found.doc = found.doc or added.doc
                    for member, definition in added.members.items():
                        found.members.setdefault(member, definition)
                return found
        if added is not None:
            return added
        return self.module(f"{path}.{name}")

    def module(self, path: str) -> Definition | None:
        found = self._modules.get(path)
        if found is None and (path in self.modules or path in self.added):
            module = self.modules.get(path)
            found = Definition(path, "module", module, module.tree if module else None)
            self._modules[path] = found
        return found

    def imported(self, target: str) -> Definition | None:
        """What an import statement binds: `from a.b import c` looks into the *module* a.b."""
        above, _, name = target.rpartition(".")
        if not above:
            return self.module(target)
        if above in self.modules or above in self.added:
            # `from . import numeric` binds the submodule to its own name: the look-up ends in
            # itself, and the module is what is left.
            return self.lookup(above, name) or self.module(target)
        owner = self.imported(above) if above.count(".") < _MAX_HOPS else None
        return None if owner is None else self.attribute(owner, name)

    def attribute(self, owner: Definition, name: str) -> Definition | None:
        if owner.kind == "module":
            return self.lookup(owner.path, name)
        if owner.kind == "instance":
            return None if owner.instance_of is None else self.member(owner.instance_of, name)
        return self.member(owner, name) if owner.kind == "class" else None

    def expression(
        self, path: str, text: str, owner: Definition | None = None
    ) -> Definition | None:
        """What a dotted expression in module `path` (in class `owner`) means."""
        if not _DOTTED.fullmatch(text):
            return None
        first, *rest = text.split(".")
        found = owner.members.get(first) if owner is not None else None
        if found is None:  # griffe leaves `from . import submodule` out: the look-up knows those
            found = self.lookup(path, first)
        if found is None and first in self.modules:
            found = self.module(first)
        for name in rest:
            if found is None:
                return None
            found = self.attribute(found, name)
        return found

    # ---- definitions

    def _define(
        self, module: Module, tree: Any, path: str, owner: Definition | None = None
    ) -> Definition | None:
        if tree.is_class:
            defined = Definition(path, "class", module, tree, owner)
            self._add_members(defined)
            return defined
        if tree.is_function:
            return Definition(path, "function", module, tree, owner)
        if tree.is_attribute:
            return self._define_attribute(module, tree, path, owner)
        return None

    def _add_members(self, cls: Definition) -> None:
        assert cls.module is not None
        for name, tree in cls.tree.members.items():
            if tree.is_alias:
                member = self.imported(tree.target_path)
            else:
                member = self._define(cls.module, tree, f"{cls.path}.{name}", cls)
            if member is not None and member.kind != "module":
                cls.members[name] = member

    def _define_attribute(
        self, module: Module, tree: Any, path: str, owner: Definition | None
    ) -> Definition:
        value = "" if tree.value is None else str(tree.value)
        plain = Definition(path, "attribute", module, tree, owner)
        if _DOTTED.fullmatch(value):
            return self.expression(module.path, value, owner) or plain
        call = _CALL.fullmatch(value)
        if call is None or len(value) > 2000 or ")(" in value:  # `Appender(doc)(f)` is an f
            return plain
        callee = self.expression(module.path, call[1], owner)
        cls = callee
        if "Accessor" in call[1] or "accessor" in call[1]:
            arguments = _DOTTED.finditer(call[2])
            classes = (self.expression(module.path, text[0], owner) for text in arguments)
            cls = next((found for found in classes if found and found.kind == "class"), cls)
        if cls is not None and cls.kind == "class":
            return Definition(path, "instance", module, tree, owner, instance_of=cls)
        return plain

    # ---- classes

    def bases(self, cls: Definition) -> list[Definition]:
        if cls.tree is None or cls.module is None:
            return cls.bases
        found = []
        for base in cls.tree.bases:
            text = str(base)
            # `with_metaclass(Meta, Base)`, `Generic[T]`: the names inside are tried in turn.
            for part in [text] if _DOTTED.fullmatch(text) else _DOTTED.finditer(text):
                name = part if isinstance(part, str) else part[0]
                base_definition = self.expression(cls.module.path, name)
                if base_definition is not None and base_definition.kind == "class":
                    found.append(base_definition)
        return found

    def mro(self, cls: Definition) -> list[Definition]:
        """The class and its bases, nearest first: C3, or depth-first where that fails."""
        done = self._mros.get(id(cls))
        if done is not None:
            return done
        self._mros[id(cls)] = [cls]
        sequences = [list(self.mro(base)) for base in self.bases(cls)]
        sequences.append(list(self.bases(cls)))
        merged = [cls, *_c3(sequences)]
        self._mros[id(cls)] = merged
        return merged

    def member(self, cls: Definition, name: str) -> Definition | None:
        for base in self.mro(cls):
            if name in base.members:
                return base.members[name]
        return None


def _c3(sequences: list[list[Definition]]) -> list[Definition]:
    merged: list[Definition] = []
    while any(sequences):
        heads = [sequence[0] for sequence in sequences if sequence]
        good = next(
            (head for head in heads if not any(head in sequence[1:] for sequence in sequences)),
            heads[0],
        )
        if good not in merged:
            merged.append(good)
        sequences = [[item for item in sequence if item is not good] for sequence in sequences]
    return merged


def _bindings(tree: Any) -> Iterator[tuple[int, str, Binding]]:
    for name, member in tree.members.items():
        if member.is_alias:
            line = member.alias_lineno or 0
            if member.wildcard:
                yield line, "*", Binding(target=member.target_path)
            else:
                yield line, name, Binding(target=member.target_path)
        else:
            yield member.lineno or 0, name, Binding(tree=member)

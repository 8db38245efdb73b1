"""Which span of a documentation block answers which kind of question.

Works on text alone, so the same rules give the gold answers for training blocks and for
contexts that came from somewhere else. Every span is copied from the block verbatim; the two
fixed sentences below are the only answers that are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ABSENT = "That is not in the documentation given."
REQUIRED = "{parameter} has no default."

BLOCK_START = re.compile(r"^### (\S+) \((\S+)==(\S+)\)\n", re.M)
SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n[-=]{3,}[ ]*\n", re.M)
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!cf)(?<!vs)(?<!etc)[.](?=\s|$)")
CAVEAT = re.compile(r"^\.\. (?:warning|note|caution)::[ ]*\n?\s*", re.M)
IDENTIFIER = re.compile(r"\*{0,2}[A-Za-z_]\w*")


@dataclass(frozen=True)
class Section:
    """One API's part of a context: `### path (package==version)`, a signature, a docstring."""

    path: str
    signature: str
    doc: str

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


def sections(context: str) -> list[Section]:
    """The blocks of a rendered context, in order."""
    starts = list(BLOCK_START.finditer(context))
    found = []
    for start, following in zip(starts, [*starts[1:], None], strict=False):
        body = context[start.end() : following.start() if following else len(context)]
        signature, _, doc = body.strip().partition("\n\n")
        found.append(Section(start[1], signature, doc))
    return found


def first_sentence(text: str) -> str:
    """`text` up to its first full stop, or to its first blank line if that comes sooner."""
    paragraph = text.strip().split("\n\n", 1)[0].rstrip()
    end = SENTENCE_END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def split_arguments(signature: str) -> list[str]:
    """`["a", "b=(1, 2)"]` of `f(a, b=(1, 2))`: cut at commas outside brackets and quotes."""
    opened = signature.find("(")
    if opened < 0:
        return []
    parts, depth, quote, start = [], 0, "", opened + 1
    for index in range(opened, len(signature)):
        char = signature[index]
        if quote:
            quote = "" if char == quote and signature[index - 1] != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                parts.append(signature[start:index])
                break
        elif char == "," and depth == 1:
            parts.append(signature[start:index])
            start = index + 1
    return [part.strip() for part in parts if part.strip()]


def arguments(signature: str) -> dict[str, str]:
    """Argument name to its text in the signature, `{"axis": "axis=0", "x": "x"}`; no `self`."""
    found = {}
    for part in split_arguments(signature):
        name = IDENTIFIER.match(part)
        if name and part not in ("self", "cls") and not part.startswith("*"):
            found[name[0]] = part
    return found


def default(section: Section, parameter: str) -> str:
    """The parameter with its default as the signature writes it, `axis=0`."""
    text = arguments(section.signature).get(parameter)
    if text is None:
        return ABSENT
    return text if "=" in text else REQUIRED.format(parameter=parameter)


def summary(section: Section) -> str:
    """The docstring's first sentence; a signature repeated on top is stepped over."""
    for paragraph in section.doc.split("\n\n"):
        text = paragraph.strip()
        if text and not re.match(rf"(?:\w+ = )?[\w.]*{re.escape(section.name)}\([^\n]*$", text):
            return first_sentence(text)
    return ABSENT


def part(doc: str, *titles: str) -> str:
    """The body of the first section with one of `titles`, `""` when there is none."""
    marks = list(SECTION.finditer(doc))
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        if mark[1] in titles:
            return doc[mark.end() : following.start() if following else len(doc)]
    return ""


def item(body: str) -> str:
    """The first entry of a numpydoc list: its line, and its description's first sentence."""
    head, _, rest = body.strip("\n").partition("\n")
    if not rest.startswith(("    ", "\t", "  ")):
        return head.strip()
    indented = []
    for line in rest.split("\n"):
        if not line.strip() or not line.startswith(" "):
            break
        indented.append(line)
    text = "\n".join(indented)
    lead = len(text) - len(text.lstrip())
    return f"{head.strip()}\n{text[:lead]}{first_sentence(text)}" if text.strip() else head.strip()


def parameters(section: Section) -> dict[str, str]:
    """Documented parameters and the span that says what each means."""
    found: dict[str, str] = {}
    body = part(section.doc, "Parameters", "Other Parameters", "Arguments")
    for entry in re.split(r"\n(?=\S)", body.strip("\n")):
        names = re.match(r"\*{0,2}([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)(?: ?:|$|\n)", entry)
        for name in names[1].split(", ") if names else ():
            found.setdefault(name, item(entry))
    for mark in re.finditer(r"^:param (?:[\w.]+ )?\\?\*{0,2}(\w+): ", section.doc, re.M):
        text = section.doc[mark.start(1) :]
        text = re.split(r"\n(?=:)", text, maxsplit=1)[0]
        found.setdefault(mark[1], first_sentence(text))
    google = re.search(r"^Args:\n((?:[ ]+\S.*\n?)+)", section.doc, re.M)
    if google:
        for mark in re.finditer(r"^[ ]{2,4}(\w+)(?: \([^)\n]*\))?: \S", google[1], re.M):
            text = re.split(r"\n[ ]{2,4}(?=\w+(?: \([^)\n]*\))?: )", google[1][mark.start(1) :])[0]
            found.setdefault(mark[1], first_sentence(text))
    return found


def meaning(section: Section, parameter: str) -> str:
    return parameters(section).get(parameter, ABSENT)


def returns(section: Section) -> str:
    """The first thing returned: its line and its description's first sentence."""
    body = part(section.doc, "Returns", "Yields")
    if body.strip():
        return item(body)
    mark = re.search(r"^(?::returns?:|Returns:\n)\s*", section.doc, re.M)
    if mark:
        text = re.split(r"\n(?=:)", section.doc[mark.end() :], maxsplit=1)[0]
        return first_sentence(text)
    return ABSENT


def raises(section: Section) -> str:
    """The first exception documented."""
    body = part(section.doc, "Raises")
    if body.strip():
        return item(body)
    mark = re.search(r"^:raises? (?=\w)", section.doc, re.M)
    if mark:
        text = re.split(r"\n(?=:)", section.doc[mark.end() :], maxsplit=1)[0]
        return first_sentence(text)
    return ABSENT


def caveat(section: Section) -> str:
    """The first sentence of the first warning or note."""
    places = []
    mark = CAVEAT.search(section.doc)
    if mark:
        places.append((mark.start(), section.doc[mark.end() :]))
    for title in ("Notes", "Warnings", "Warning", "Note"):
        body = part(section.doc, title)
        if body.strip():
            places.append((section.doc.index(body), body))
    return first_sentence(min(places)[1]) if places else ABSENT


def example(section: Section) -> str:
    """The first line of an interactive example that is no import."""
    for line in section.doc.split("\n"):
        text = line.strip()
        if text.startswith(">>> ") and not re.match(r">>> (?:import|from|#)\b", text):
            return text
    return ABSENT


def related(section: Section) -> str:
    """The first entry of "See Also"."""
    body = part(section.doc, "See Also", "See also")
    return item(body) if body.strip() else ABSENT


def answer(section: Section, kind: str, parameter: str = "") -> str:
    """The wanted answer to a question of `kind` about `section`."""
    if kind == "signature":
        return section.signature
    if kind == "default":
        return default(section, parameter)
    if kind == "parameter":
        return meaning(section, parameter)
    return {
        "summary": summary,
        "returns": returns,
        "raises": raises,
        "caveat": caveat,
        "example": example,
        "related": related,
    }[kind](section)

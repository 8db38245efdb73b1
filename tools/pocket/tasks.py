"""Contexts with questions, made from documentation blocks by a seeded generator.

Owns the mixture: how many blocks share a context, how far they are trimmed, which questions are
asked, and how names are replaced so that remembering does not pay. Sizes of contexts are in
characters here; the caller counts tokens.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pocket import spans
from pocket.questions import HEADINGS, ask
from pocket.sources import Block

VALUES = (
    *("None", "True", "False", "0", "1", "2", "-1", "()", "[]", "{}", "''", "0.5", "1e-05", "..."),
    *("0.01", "10", "100", "1.0", "np.nan", "np.inf", "float", "int", "'auto'", "(0, 1)"),
)
KINDS = {
    "signature": 3.0,
    "summary": 6.0,
    "default": 3.0,
    "parameter": 5.0,
    "returns": 5.0,
    "raises": 1.0,
    "caveat": 1.2,
    "example": 1.2,
    "related": 0.7,
}
PACKAGE_NAMES = ("lib", "core", "kit", "tools", "flow", "grid", "mesh", "data", "py")


@dataclass(frozen=True)
class Question:
    """A question about the API `name` (as the question spells it) of the block headed `path`."""

    kind: str
    text: str
    answer: str
    name: str = ""
    path: str = ""

    @property
    def absent(self) -> bool:
        return self.answer == spans.ABSENT


@dataclass(frozen=True)
class Group:
    """One context and questions about it; `heading` goes on top of the context."""

    heading: str
    context: str
    questions: list[Question]

    def user_message(self, question: Question) -> str:
        """What the chat template is given, as ragfleet renders it."""
        return f"{self.heading}\n\n{self.context}\n\nQuestion: {question.text}"


@dataclass(frozen=True)
class Mixture:
    """Shares (0 to 1) and sizes of what is generated."""

    context_chars: tuple[int, int] = (100, 2500)
    blocks: tuple[int, ...] = (1, 1, 2, 2, 3, 4, 5)
    questions: int = 8
    invented: float = 0.1
    renamed: float = 0.5
    typed: float = 0.15
    absent: float = 0.06
    lacking: float = 0.05
    empty: float = 0.01
    short_name: float = 0.3


@dataclass
class Generator:
    """Seeded stream of groups over `blocks`, which lie in file order, so neighbours are alike."""

    blocks: Sequence[Block]
    mixture: Mixture
    seed: int
    rng: random.Random = field(init=False)
    words: list[str] = field(init=False)
    rich: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.rich = [
            index
            for index, block in enumerate(self.blocks)
            if "=" in block.signature
            and re.search(r"^Parameters\n|^:param |^Args:", block.doc, re.M)
        ]
        text = " ".join(block.doc for block in self.blocks[:: max(1, len(self.blocks) // 4000)])
        count = Counter(re.findall(r"\b[a-z]{2,8}\b", text))
        self.words = sorted(word for word, times in count.items() if times > 4)

    def invent_name(self) -> str:
        """A made-up identifier: words, syllables or letters, joined as programmers join them."""
        rng = self.rng
        parts = []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            draw = rng.random()
            if draw < 0.7:
                parts.append(rng.choice(self.words))
            elif draw < 0.9:
                letters = [rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(2)]
                parts.append("".join(letters) + rng.choice(("", "x", "n", "2", "3d")))
            else:
                parts.append("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3)))
        style = rng.random()
        if style < 0.6:
            return "_".join(parts)
        if style < 0.85:
            return "".join(part[:1].upper() + part[1:] for part in parts)
        return "".join(parts)

    def invent_value(self) -> str:
        rng = self.rng
        draw = rng.random()
        if draw < 0.5:
            return rng.choice(VALUES)
        if draw < 0.7:
            return str(rng.randrange(1000))
        if draw < 0.8:
            return f"{rng.random() * 10:.{rng.randrange(1, 4)}f}"
        if draw < 0.95:
            return f"'{rng.choice(self.words)}'"
        return rng.choice(self.words)

    def invent_sentence(self) -> str:
        rng = self.rng
        words = [rng.choice(self.words) for _ in range(rng.randrange(3, 14))]
        if rng.random() < 0.3:
            words[rng.randrange(len(words))] = f"`{self.invent_name()}`"
        return " ".join(words).capitalize() + "."

    def invent_block(self, package: str) -> Block:
        """A block of random names and words: nothing to remember, all to be copied."""
        rng = self.rng
        path = [package] + [self.invent_name() for _ in range(rng.randrange(1, 4))]
        names = [self.invent_name() for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
        shown = [n if rng.random() < 0.4 else f"{n}={self.invent_value()}" for n in names]
        paragraphs = [" ".join(self.invent_sentence() for _ in range(rng.choice((1, 1, 2))))]
        listed = rng.sample(names, k=rng.randrange(len(names) + 1))
        if listed:
            items = [
                f"{n} : {rng.choice(self.words)}\n    {self.invent_sentence()}" for n in listed
            ]
            paragraphs.append("Parameters\n----------\n" + "\n".join(items))
        if rng.random() < 0.4:
            text = f"{self.invent_name()} : {rng.choice(self.words)}\n    {self.invent_sentence()}"
            paragraphs.append(f"Returns\n-------\n{text}")
        if rng.random() < 0.2:
            name = self.invent_name() + "Error"
            paragraphs.append(f"Raises\n------\n{name}\n    {self.invent_sentence()}")
        if rng.random() < 0.2:
            paragraphs.append(f"Notes\n-----\n{self.invent_sentence()}")
        if rng.random() < 0.2:
            paragraphs.append(f"Examples\n--------\n>>> {path[-1]}({self.invent_value()})")
        signature = f"{path[-1]}({', '.join(shown)})"
        doc = "\n\n".join(paragraphs)
        return Block(".".join(path), package, "1.0", signature, signature, doc)

    def rename(self, chosen: list[Block]) -> list[Block]:
        """Replace names and defaults consistently over all blocks of a context."""
        rng = self.rng
        new: dict[str, str] = {}
        for block in chosen:
            own = block.path.split(".") + list(spans.arguments(block.signature))
            for name in own:
                if len(name) > 2 and name not in new and rng.random() < 0.85:
                    new[name] = self.invent_name()
        if not new:
            return chosen
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, new))})\b")

        def swap(text: str) -> str:
            return pattern.sub(lambda match: new[match[0]], text)

        renamed = []
        for block in chosen:
            signature = swap(block.signature)
            for text in spans.arguments(signature).values():
                name, equals, _ = text.partition("=")
                if equals and rng.random() < 0.4:
                    signature = signature.replace(text, f"{name}={self.invent_value()}", 1)
            path = ".".join(new.get(part, part) for part in block.path.split("."))
            package = path.split(".")[0]
            renamed.append(
                replace(block, path=path, package=package, signature=signature, doc=swap(block.doc))
            )
        return renamed

    def shorten(self, block: Block) -> Block:
        """Drop inner modules from the path now and then, as re-exported names lack them."""
        parts = block.path.split(".")
        keep = 2 if len(parts) > 2 and parts[-2][:1].isupper() else 1
        inner = parts[1:-keep]
        if inner and self.rng.random() < 0.6:
            inner = inner[: self.rng.randrange(len(inner) + 1)]
        return replace(block, path=".".join([parts[0], *inner, *parts[-keep:]]))

    def choose(self, count: int) -> tuple[list[Block], list[Block]]:
        """`count` blocks for the context and two like them that stay outside."""
        rng = self.rng
        if rng.random() < self.mixture.invented:
            package = self.invent_name().lower()
            made = [self.invent_block(package) for _ in range(count + 2)]
            return made[:count], made[count:]
        rich = self.rich if rng.random() < 0.75 else range(len(self.blocks))
        centre = rng.choice(rich)
        chosen = [self.blocks[centre]]
        while len(chosen) < count + 2:
            near = centre + rng.randrange(-25, 26)
            index = near if rng.random() < 0.7 else rng.randrange(len(self.blocks))
            block = self.blocks[index % len(self.blocks)]
            if all(block.path != other.path for other in chosen):
                chosen.append(block)
        chosen = [self.shorten(block) for block in chosen]
        if rng.random() < self.mixture.typed:
            chosen = [replace(block, signature=block.typed_signature) for block in chosen]
        if rng.random() < self.mixture.renamed:
            chosen = self.rename(chosen)
        target = chosen[:count]
        rng.shuffle(target)
        return target, chosen[count:]

    def trim(self, block: Block, chars: int) -> Block:
        """Cut the docstring to about `chars`: whole sections, in order, some left out at random.

        A section that is too long is cut between its entries; the first paragraph always stays.
        """
        marks = [match.start() for match in spans.SECTION.finditer(block.doc)]
        bounds = [0, *(mark for mark in marks if mark > 0), len(block.doc)]
        pieces = [block.doc[a:b].strip() for a, b in pairwise(bounds)]
        paragraphs = pieces[0].split("\n\n")
        kept = [paragraphs[0]]
        if self.rng.random() < 0.06 and "(" in block.signature:
            kept.insert(0, block.signature)  # some packages repeat it there
        left = chars - len(paragraphs[0])
        more = [paragraph for paragraph in paragraphs[1:] if self.rng.random() < 0.5]
        for piece in more + pieces[1:]:
            if left < 40 or self.rng.random() < 0.2:
                continue
            if len(piece) > left:
                cuts = [m.start() for m in re.finditer(r"\n(?=\S)", piece) if m.start() < left]
                if len(cuts) < 3:
                    continue
                kept.append(piece[: cuts[-1]].rstrip())
            else:
                kept.append(piece)
            left -= len(kept[-1])
        return replace(block, doc="\n\n".join(kept))

    def group(self, fits: Callable[[str], bool]) -> Group:
        """The next context with its questions; `fits` refuses contexts that are too long."""
        while True:
            group = self.attempt(fits)
            answered = sum(not question.absent for question in group.questions)
            if answered or (not group.context and group.questions):
                return group

    def attempt(self, fits: Callable[[str], bool]) -> Group:
        rng, mixture = self.rng, self.mixture
        heading = rng.choice(HEADINGS)
        empty = rng.random() < mixture.empty
        count = rng.choice(mixture.blocks)
        inside, outside = self.choose(count)
        room = rng.randint(*mixture.context_chars)
        shares = [rng.random() + 0.3 for _ in inside]
        trimmed = [
            self.trim(block, int(room * share / sum(shares)) - 60)
            for block, share in zip(inside, shares, strict=True)
        ]
        if empty:
            outside, trimmed = outside + trimmed, []
        while trimmed and not fits(render(trimmed)):
            outside.append(trimmed.pop())
        if not trimmed and not empty:
            return Group(heading, "", [])
        context = render(trimmed)
        questions = self.questions(context, outside, count=mixture.questions)
        return Group(heading, context, questions)

    def questions(self, context: str, outside: list[Block], count: int) -> list[Question]:
        """Up to `count` different questions about the context, some without an answer in it."""
        rng, mixture = self.rng, self.mixture
        found = spans.sections(context)
        names = [section.name for section in found]
        others = [spans.Section(b.path, b.signature, b.doc) for b in outside]
        others = [o for o in others if o.name not in names and o.path not in context]
        asked: dict[tuple[str, str, str], Question] = {}
        for _ in range(count):
            draw = rng.random()
            outsider = bool(others) and (not found or draw < mixture.absent)
            places = others if outsider else found
            lacking = outsider or draw > 1 - mixture.lacking
            for _ in range(6 if places else 0):
                section, kind, parameter = self.pick(places, found, lacking)
                if not kind or (section.path, kind, parameter) in asked:
                    continue
                wanted = spans.ABSENT if outsider else spans.answer(section, kind, parameter)
                if lacking != (wanted == spans.ABSENT):
                    continue
                short = rng.random() < mixture.short_name and names.count(section.name) < 2
                name = section.name if short else section.path
                if short and "." in section.path and rng.random() < 0.2:
                    name = ".".join(section.path.split(".")[-2:])
                text = ask(rng, kind, name, parameter)
                asked[section.path, kind, parameter] = Question(
                    kind, text, wanted, name, section.path
                )
                break
        return list(asked.values())

    def pick(
        self, places: list[spans.Section], found: list[spans.Section], lacking: bool
    ) -> tuple[spans.Section, str, str]:
        """What to ask about: a section, a kind, a parameter; kind `""` when that can't be asked."""
        kind = self.rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        able = [s for s in places if lacking or self.answerable(s, kind)]
        if not able:
            return places[0], "", ""
        section = self.rng.choice(able)
        parameter = self.parameter(section, kind, found)
        if kind in ("default", "parameter") and not parameter:
            return section, "", ""
        return section, kind, parameter

    def answerable(self, section: spans.Section, kind: str) -> bool:
        """Whether the section answers a question of `kind` with a span of its own."""
        if kind == "default":
            return "=" in section.signature
        if kind == "parameter":
            return bool(spans.parameters(section))
        return spans.answer(section, kind) != spans.ABSENT

    def parameter(self, section: spans.Section, kind: str, found: list[spans.Section]) -> str:
        """The parameter a question is about, `""` when there is none to ask about."""
        rng = self.rng
        taken = spans.arguments(section.signature)
        if kind == "default":
            if rng.random() < 0.05:
                strange = [n for s in found for n in spans.arguments(s.signature) if n not in taken]
                return rng.choice(strange) if strange else ""
            with_default = [name for name, text in taken.items() if "=" in text]
            names = with_default if with_default and rng.random() < 0.85 else list(taken)
            return rng.choice(names) if names else ""
        if kind == "parameter":
            listed = list(spans.parameters(section))
            names = listed if listed and rng.random() < 0.95 else list(taken)
            return rng.choice(names) if names else ""
        return ""


def render(blocks: Sequence[Block]) -> str:
    """A context as ragfleet assembles it."""
    return "\n\n".join(
        f"### {b.path} ({b.package}=={b.version})\n{b.signature}\n\n{b.doc}" for b in blocks
    )

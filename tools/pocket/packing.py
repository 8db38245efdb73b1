"""Groups to tensors: several questions share one context.

Every question sees the context and itself, never another question, and its positions go on where
the context ends: a row teaches exactly what as many single prompts would, for a fraction of
the work. Tokens are packed without padding; only attention lays them out in grids.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pocket.model import Layout
from pocket.spans import BLOCK_START
from pocket.tasks import Group
from pocket.tokenizer import ANSWER, BOS, CONTEXT, END, PAD, QUESTION

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """A context's tokens and the questions about it."""

    prefix: list[int]
    tails: list[Tail]
    names: list[int]
    """For each token of the prefix, the place of its block's name (its last token); -1: none."""


@dataclass(frozen=True)
class Tail:
    """A question's tokens, and how many of them, the last ones, are answer.

    `name` is the place of the asked name's last token among them; `copied` the places in the
    context of the answer's tokens, where the asked block holds them just so, else empty.
    """

    tokens: list[int]
    answer: int
    kind: str
    absent: bool
    name: int
    copied: list[int]


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` `[N]` and how the tokens belong together.

    `source` indexes the tokens that predict an answer's token, `target` says which, and `owner`
    numbers the answer it belongs to; `plain_*` are the same for context tokens.

    `named`, `tail_named`, `copied`: `[3, K]` each, (row, query, key) in the grids of attention:
    where a context's token finds its block's name, an answer's token the name asked about, and
    the token to say next.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout
    source: Tensor
    target: Tensor
    owner: Tensor
    kinds: list[tuple[str, bool]]
    plain_source: Tensor
    plain_target: Tensor
    named: Tensor
    tail_named: Tensor
    copied: Tensor


class Encoder:
    """Text to tokens exactly as the chat template and the tokenizer would give them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special: dict[str, int] = {}
        for name in (PAD, BOS, CONTEXT, QUESTION, ANSWER, END):
            number = tokenizer.token_to_id(name)
            if number is None:
                raise ValueError(f"the tokenizer lacks {name}: train it again")
            self.special[name] = number

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def row(self, group: Group) -> Row:
        """Questions whose answer is longer than `MAX_ANSWER_TOKENS` are left out."""
        mark = self.special
        head = f"{group.heading}\n\n{group.context}".strip()
        encoded = self.tokenizer.encode(head, add_special_tokens=False)
        prefix = [mark[BOS], mark[CONTEXT], *encoded.ids]
        starts = [0, 0, *(start for start, _ in encoded.offsets)]
        blocks = list(BLOCK_START.finditer(head))
        names = [-1] * len(prefix)
        bounds: dict[str, tuple[int, int]] = {}
        ends = [block.start() for block in blocks[1:]] + [len(head)]
        for block, end in zip(blocks, ends, strict=False):
            name = bisect_left(starts, block.end(1)) - 1
            bounds[block[1]] = (name, bisect_left(starts, end))
            for place in range(name + 1, bounds[block[1]][1]):
                names[place] = name
        tails = []
        for question in group.questions:
            answer = [*self.encode(question.answer), mark[END]]
            if len(answer) > MAX_ANSWER_TOKENS + 1:
                continue
            text = self.tokenizer.encode(question.text, add_special_tokens=False)
            end = question.text.find(question.name) + len(question.name)
            name = bisect_left([start for start, _ in text.offsets], end)  # one mark goes before
            copied: list[int] = []
            if question.path in bounds and not question.absent:
                copied = occurrence(prefix, answer[:-1], *bounds[question.path])
            tokens = [mark[QUESTION], *text.ids, mark[ANSWER], *answer]
            tails.append(Tail(tokens, len(answer), question.kind, question.absent, name, copied))
        return Row(prefix, tails, names)


def occurrence(tokens: Sequence[int], wanted: Sequence[int], start: int, stop: int) -> list[int]:
    """Places of `wanted` in `tokens[start:stop]` if it is there just once, else none."""
    size = len(wanted)
    found = [
        at for at in range(start, stop - size + 1) if list(tokens[at : at + size]) == list(wanted)
    ]
    return list(range(found[0], found[0] + size)) if len(found) == 1 else []


def pack(rows: Sequence[Row]) -> Batch:
    """One batch of `rows`: all contexts, then all tails."""
    ids = [token for row in rows for token in row.prefix]
    positions = [place for row in rows for place in range(len(row.prefix))]
    tails = [(index, tail) for index, row in enumerate(rows) for tail in row.tails]
    widest = max(len(row.prefix) for row in rows)
    longest = max(len(tail.tokens) for _, tail in tails)
    contexts = torch.zeros(len(rows), widest, dtype=torch.long)
    keys = torch.zeros(len(tails), widest + longest, dtype=torch.long)
    tail_grid = torch.zeros(len(tails), longest, dtype=torch.long)
    mask = torch.full((len(tails), 1, longest, widest + longest), float("-inf"))
    mask[..., widest:] = mask[..., widest:].triu(1)
    back: list[int] = []
    source: list[int] = []
    plain_source: list[int] = []
    named = [
        (index, place, name)
        for index, row in enumerate(rows)
        for place, name in enumerate(row.names)
        if name >= 0
    ]
    tail_named: list[tuple[int, int, int]] = []
    copied: list[tuple[int, int, int]] = []
    at = 0
    for index, row in enumerate(rows):
        size = len(row.prefix)
        contexts[index, :size] = torch.arange(at, at + size)
        back.extend(range(index * widest, index * widest + size))
        plain_source.extend(range(at + 1, at + size - 1))
        at += size
    for number, (index, tail) in enumerate(tails):
        size, before, answer = len(tail.tokens), len(rows[index].prefix), tail.answer
        ids.extend(tail.tokens)
        positions.extend(range(before, before + size))
        tail_grid[number, :size] = torch.arange(at, at + size)
        keys[number, :widest] = contexts[index]
        keys[number, widest : widest + size] = torch.arange(at, at + size)
        mask[number, :, :, :before] = 0
        start = len(rows) * widest + number * longest
        back.extend(range(start, start + size))
        source.extend(range(at + size - answer - 1, at + size - 1))
        first = size - answer - 1
        tail_named.extend((number, place, widest + tail.name) for place in range(first, size - 1))
        copied.extend((number, first + nth, place) for nth, place in enumerate(tail.copied))
        at += size
    layout = Layout(contexts, tail_grid, keys, mask, torch.tensor(back))
    return Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        layout,
        torch.tensor(source),
        torch.tensor([token for _, tail in tails for token in tail.tokens[-tail.answer :]]),
        torch.tensor(
            [number for number, (_, tail) in enumerate(tails) for _ in range(tail.answer)]
        ),
        [(tail.kind, tail.absent) for _, tail in tails],
        torch.tensor(plain_source),
        torch.tensor([token for row in rows for token in row.prefix[2:]]),
        *(triples(found) for found in (named, tail_named, copied)),
    )


def triples(found: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3).T

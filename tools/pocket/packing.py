"""Groups to tensors: several questions share one context.

Every question sees the context and itself, never another question, and its positions go on where
the context ends: a row teaches exactly what as many single prompts would, for a fraction of
the work. Tokens are packed without padding; only attention lays them out in grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pocket.model import Layout
from pocket.tasks import Group
from pocket.tokenizer import ANSWER, BOS, CONTEXT, END, PAD, QUESTION

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """A context's tokens and, for each question, its tokens and how many of them are answer."""

    prefix: list[int]
    tails: list[tuple[list[int], int, str, bool]]


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` `[N]` and how the tokens belong together.

    `source` indexes the tokens that predict an answer's token, `target` says which, and `owner`
    numbers the answer it belongs to; `plain_*` are the same for context tokens.
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
        prefix = [mark[BOS], mark[CONTEXT], *self.encode(head)]
        tails = []
        for question in group.questions:
            answer = [*self.encode(question.answer), mark[END]]
            if len(answer) > MAX_ANSWER_TOKENS + 1:
                continue
            asked = [mark[QUESTION], *self.encode(question.text), mark[ANSWER]]
            tails.append((asked + answer, len(answer), question.kind, question.absent))
        return Row(prefix, tails)


def pack(rows: Sequence[Row]) -> Batch:
    """One batch of `rows`: all contexts, then all tails."""
    ids = [token for row in rows for token in row.prefix]
    positions = [place for row in rows for place in range(len(row.prefix))]
    tails = [(index, *tail) for index, row in enumerate(rows) for tail in row.tails]
    widest = max(len(row.prefix) for row in rows)
    longest = max(len(tail[1]) for tail in tails)
    contexts = torch.zeros(len(rows), widest, dtype=torch.long)
    keys = torch.zeros(len(tails), widest + longest, dtype=torch.long)
    tail_grid = torch.zeros(len(tails), longest, dtype=torch.long)
    mask = torch.full((len(tails), 1, longest, widest + longest), float("-inf"))
    mask[..., widest:] = mask[..., widest:].triu(1)
    back: list[int] = []
    source: list[int] = []
    plain_source: list[int] = []
    at = 0
    for index, row in enumerate(rows):
        size = len(row.prefix)
        contexts[index, :size] = torch.arange(at, at + size)
        back.extend(range(index * widest, index * widest + size))
        plain_source.extend(range(at + 1, at + size - 1))
        at += size
    for number, (index, tokens, answer, _, _) in enumerate(tails):
        size, before = len(tokens), len(rows[index].prefix)
        ids.extend(tokens)
        positions.extend(range(before, before + size))
        tail_grid[number, :size] = torch.arange(at, at + size)
        keys[number, :widest] = contexts[index]
        keys[number, widest : widest + size] = torch.arange(at, at + size)
        mask[number, :, :, :before] = 0
        start = len(rows) * widest + number * longest
        back.extend(range(start, start + size))
        source.extend(range(at + size - answer - 1, at + size - 1))
        at += size
    layout = Layout(contexts, tail_grid, keys, mask, torch.tensor(back))
    return Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        layout,
        torch.tensor(source),
        torch.tensor([token for tail in tails for token in tail[1][-tail[2] :]]),
        torch.tensor([number for number, tail in enumerate(tails) for _ in range(tail[2])]),
        [(kind, absent) for _, _, _, kind, absent in tails],
        torch.tensor(plain_source),
        torch.tensor([token for row in rows for token in row.prefix[2:]]),
    )

"""Scores of an exported model: plain `generate`, fp32, greedy, one prompt at a time.

Two sets, neither of a package trained on: contexts drawn from held-out packages, two to five
APIs each, by length; and the evaluation-shaped records of a contexts file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocket import spans
from pocket.packing import MAX_ANSWER_TOKENS, Encoder
from pocket.questions import FORMS
from pocket.sources import Block
from pocket.tasks import Generator, Group, Mixture, Question

SYSTEM = (
    "You answer questions about programming interfaces from the documentation given. "
    "If the answer is not in the documentation, say so."
)
RECORD_HEADINGS = {
    "exact_api_match": "Documentation of the API asked about:",
    "rag_string_match": "Documentation matched by name:",
    "rag_fallback": "Documentation retrieved for the question:",
}
LENGTHS = (256, 512, 1024)


@dataclass(frozen=True)
class Case:
    """One prompt and its wanted answer; `column` groups the table (a context length in tokens)."""

    column: str
    kind: str
    user: str
    wanted: str

    @property
    def row(self) -> str:
        return "not in the documentation" if self.wanted == spans.ABSENT else self.kind

    @property
    def chinese(self) -> bool:
        return re.search("[\u4e00-\u9fff]", self.user.rsplit("Question: ", 1)[-1]) is not None


def drawn_cases(
    blocks: Sequence[Block], encoder: Encoder, per_cell: int, seed: int
) -> Iterator[Case]:
    """`per_cell` cases of each kind and length from held-out blocks, with distractor APIs."""
    for low, high in zip((0, *LENGTHS), LENGTHS, strict=False):
        mixture = Mixture(
            context_chars=(int(low * 2.2), int(high * 2.4)),
            blocks=(2, 3, 4, 5),
            questions=12,
            invented=0.0,
            renamed=0.0,
            typed=0.0,
            empty=0.0,
        )

        def fits(text: str, most: int = high) -> bool:
            return len(encoder.encode(text)) <= most

        taken: dict[str, int] = defaultdict(int)
        generator = Generator(blocks, mixture, seed=seed + high)
        for _ in range(60 * per_cell):
            group = generator.group(fits)
            if group.context.count("### ") < 2 or len(encoder.encode(group.context)) <= low:
                continue
            for question in one_of_each(group.questions):
                case = Case(
                    f"≤ {high}", question.kind, group.user_message(question), question.answer
                )
                too_long = len(encoder.encode(question.answer)) > MAX_ANSWER_TOKENS
                if taken[case.row] < per_cell and not too_long:
                    taken[case.row] += 1
                    yield case


def one_of_each(questions: Iterable[Question]) -> list[Question]:
    """The first question of each kind, so that no context weighs much."""
    return list({(q.absent, q.absent or q.kind): q for q in questions}.values())


def record_cases(path: Path, encoder: Encoder, longest: int) -> Iterator[Case]:
    """Cases from a contexts file; records of an unknown question form or too long are left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        context, api = record["context"], record["target_api"]
        if len(encoder.encode(context)) > longest:
            continue
        kind = kind_of(record["query"], api)
        if kind is None:
            continue
        about = [section for section in spans.sections(context) if section.path == api]
        wanted = spans.answer(about[0], kind) if about else spans.ABSENT
        if len(encoder.encode(wanted)) > MAX_ANSWER_TOKENS:
            continue
        group = Group(RECORD_HEADINGS[record["retrieval_method"]], context, [])
        user = group.user_message(Question(kind, record["query"], wanted))
        yield Case("records", kind, user, wanted)


def kind_of(query: str, api: str) -> str | None:
    """The kind of a question by its wording."""
    for kind, forms in FORMS.items():
        for form in forms:
            for name in (api, api.rsplit(".", 1)[-1]):
                if query == form.format(x=name, p=""):
                    return kind
    return None


@torch.no_grad()
def answers(folder: Path, users: Iterable[str]) -> Iterator[str]:
    """The model's answers to user messages."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for user in users:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=MAX_ANSWER_TOKENS + 1, do_sample=False)
        text: str = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], True)
        yield text


def evaluate(
    folder: Path, cases: Sequence[Case], details: Path
) -> dict[str, dict[str, tuple[int, int]]]:
    """Exact matches and cases, by row and column of the table; every answer goes to `details`."""
    cells: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    with details.open("w", encoding="utf-8") as file:
        for case, got in zip(cases, answers(folder, (c.user for c in cases)), strict=True):
            right = got == case.wanted
            for row in [case.row, "all"] + (["asked in Chinese"] if case.chinese else []):
                cells[row][case.column].append(right)
            file.write(json.dumps({**asdict(case), "got": got, "right": right}) + "\n")
    return {
        row: {column: (sum(hits), len(hits)) for column, hits in columns.items()}
        for row, columns in cells.items()
    }


def table(scores: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The scores as Markdown: per cent exact, and of how many."""
    columns = [f"≤ {length}" for length in LENGTHS] + ["records"]
    names = {"summary": "first sentence", "default": "default", "related": "see also"}
    rows = [kind for kind in FORMS if kind in scores]
    rows += ["not in the documentation", "asked in Chinese", "all"]
    lines = ["| wanted span, exact | " + " | ".join(columns) + " |", "|---" * 5 + "|"]
    for row in rows:
        cells = []
        for column in columns:
            right, of = scores.get(row, {}).get(column, (0, 0))
            cells.append(f"{100 * right / of:.0f} % of {of}" if of else "")
        lines.append(f"| {names.get(row, row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

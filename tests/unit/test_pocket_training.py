"""What the pocket model is trained with: its questions, its packed batches, its export.

The model's own answers are held to plain `generate` in tests/contract/test_pocket.py.
"""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from models import ROOT

torch = pytest.importorskip("torch", reason="training needs torch")


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


POCKET = ROOT / "src" / "ragfleet" / "pocket"
DOC = """\
Turn a dial by some angle. Slowly.

Parameters
----------
angle : float
    Degrees, clockwise. Negative ones are allowed.
*rest
    Passed on.

Returns
-------
bool
    Whether it moved.

Raises
------
StuckError
    If it is stuck.

Notes
-----
Not safe from two threads. Really.

Examples
--------
>>> import lab
>>> turn(3)

See Also
--------
lab.push : Push it instead."""


def generator(seed: int) -> Any:
    from pocket.sources import Block
    from pocket.tasks import Generator, Mixture

    blocks = [
        Block(f"lab.Dial{n}.turn", "lab", "1.0", f"turn(self, angle={n})", "turn(...)", DOC)
        for n in range(30)
    ]
    mixture = Mixture(context_chars=(300, 900), invented=0.5, questions=6)
    return Generator(blocks, mixture, seed=seed)


def small_groups(seed: int, count: int) -> list[Any]:
    made = generator(seed)
    return [made.group(lambda text: len(text) < 2500) for _ in range(count)]


def test_spans_of_a_numpy_style_docstring() -> None:
    from pocket import spans

    section = spans.Section("lab.turn", "turn(angle, *rest, unit='deg')", DOC)
    wanted = {
        ("signature", ""): "turn(angle, *rest, unit='deg')",
        ("summary", ""): "Turn a dial by some angle.",
        ("default", "unit"): "unit='deg'",
        ("default", "angle"): "angle has no default.",
        ("default", "speed"): spans.ABSENT,
        ("parameter", "angle"): "angle : float\n    Degrees, clockwise.",
        ("returns", ""): "bool\n    Whether it moved.",
        ("raises", ""): "StuckError\n    If it is stuck.",
        ("caveat", ""): "Not safe from two threads.",
        ("example", ""): ">>> turn(3)",
        ("related", ""): "lab.push : Push it instead.",
    }
    assert {asked: spans.answer(section, *asked) for asked in wanted} == wanted


def test_every_answer_is_a_span_of_its_context_or_says_that_there_is_none() -> None:
    from pocket import spans

    kinds, absent = set(), 0
    for group in small_groups(seed=3, count=60):
        for question in group.questions:
            kinds.add(question.kind)
            absent += question.absent
            fixed = question.absent or question.answer.endswith(" has no default.")
            assert fixed or question.answer in group.context, question
    assert len(kinds) > 6
    assert absent > 5
    assert spans.ABSENT  # what `absent` compares with


def test_the_same_seed_asks_the_same() -> None:
    assert small_groups(seed=5, count=8) == small_groups(seed=5, count=8)
    assert small_groups(seed=5, count=8) != small_groups(seed=6, count=8)


def test_a_shared_context_teaches_what_single_prompts_would(tmp_path: Path) -> None:
    """Packed logits equal those of `LlamaForCausalLM` on each prompt alone, answer for answer."""
    from pocket import export
    from pocket import tokenizer as bpe
    from pocket.model import Llama, Shape
    from pocket.packing import Encoder, pack

    torch.manual_seed(0)
    encoder = Encoder(bpe.load(POCKET))
    shape = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96)
    model = Llama(shape)
    state = {"model": model.state_dict(), "shape": vars(shape), "step": 1, "seconds": 1.0}
    torch.save(state, tmp_path / "model.pt")
    assert export.export(tmp_path / "model.pt", POCKET, encoder, tmp_path / "out") < 1e-3

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    model.load_state_dict({k: v for k, v in exported.state_dict().items() if k != "lm_head.weight"})
    groups = [group for group in small_groups(seed=9, count=6) if group.context]
    rows = [encoder.row(group) for group in groups]
    batch = pack(rows)
    with torch.no_grad():
        states = model.hidden_states(batch.ids, batch.positions, batch.layout)
        packed = model.logits(states[batch.source])
    owner = 0
    for group in groups:
        for question in islice(group.questions, 3):
            messages = [{"role": "user", "content": group.user_message(question)}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)[
                "input_ids"
            ]
            answer = batch.target[batch.owner == owner].tolist()
            assert tokenizer.decode(answer, skip_special_tokens=True) == question.answer
            with torch.no_grad():
                plain = exported(torch.tensor([prompt + answer])).logits[0]
            torch.testing.assert_close(
                packed[batch.owner == owner], plain[len(prompt) - 1 : -1], atol=1e-4, rtol=1e-4
            )
            owner += 1
        owner += len(group.questions) - min(3, len(group.questions))
    assert owner == len(batch.kinds)


def test_two_heads_are_told_where_to_look() -> None:
    from pocket import tokenizer as bpe
    from pocket.packing import Encoder, pack

    encoder = Encoder(bpe.load(POCKET))
    tokens = encoder.tokenizer
    groups = [group for group in small_groups(seed=4, count=8) if group.context]
    rows = [encoder.row(group) for group in groups]
    batch = pack(rows)
    widest = max(len(row.prefix) for row in rows)
    copies = 0
    for row, group in zip(rows, groups, strict=True):
        for tail, question in zip(row.tails, group.questions, strict=True):
            asked = tokens.decode(tail.tokens[1 : tail.name + 1])
            assert asked.endswith(question.name)
            copied = [row.prefix[place] for place in tail.copied]
            assert copied in ([], tail.tokens[-tail.answer : -1])
            copies += bool(copied)
        for place, name in enumerate(row.names):
            if name >= 0:
                before = tokens.decode(row.prefix[2 : name + 1])
                heading = before.rsplit("### ", 1)[1]
                assert place > name
                headings = re.findall(r"^### (\S+)", group.context, re.M)
                assert heading in headings
    assert copies > 15
    for number, query, key in batch.copied.T.tolist():
        said = batch.layout.tails[number, query + 1]
        seen = batch.layout.keys[number, key]
        assert key < widest
        assert batch.ids[said] == batch.ids[seen]


def test_a_wheel_of_another_licence_is_refused(tmp_path: Path) -> None:
    import zipfile

    from pocket.sources import check_licence

    wheel = tmp_path / "lab-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lab-1.0.dist-info/METADATA", "Name: lab\nLicense-Expression: MIT\n")
    check_licence(wheel, "lab", "MIT")
    with pytest.raises(ValueError, match="lab is listed under BSD-3-Clause, its wheel says: 'MIT'"):
        check_licence(wheel, "lab", "BSD-3-Clause")

"""The model card: what was trained on what, how well it does, what it can't do."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from pocket.sources import HELD_OUT, TRAINING

CARD = """\
# pocket

A Llama of {parameters:.1f} M parameters that answers questions about programming interfaces by
copying a span of the documentation in its prompt: the signature, the first sentence, a
parameter's meaning or default, what is returned, the first exception, note, example or related
name. When the span isn't there it says "That is not in the documentation given."

It exists for demonstrations and tests: right answers show that a pipeline works, and one shifted
position or one lost cache block shows in them. It knows nothing and is of no use beyond that.

## Scores

Exact match of the whole answer. Plain `generate`, fp32, greedy, batch size 1, on packages that
were not trained on ({held_out}). The first three
columns: contexts of two to five APIs, by length in tokens, up to {per_cell} prompts a cell. The
last: the records of `examples/contexts.jsonl` whose context has at most 1,024 tokens. Answers of
more than 64 tokens aren't asked for.

{table}

Made by `python tools/train_pocket_model.py eval`.

## Prompt

The chat template leaves the system message out (it never changes what is right) and cuts the user
message at its last `Question: `:
`<|begin|><|context|>` heading and context `<|question|>` question `<|answer|>` answer `<|end|>`.
The special tokens at the cut make the tokens of a shared context independent of the question.

## Training

`tools/train_pocket_model.py`, seed 1: {steps} steps, {minutes} minutes on two shared CPU cores.
Pairs are made by templates from documentation parsed out of released wheels (their code is not
run); in half of the contexts names and defaults are replaced by invented ones, and some blocks are
invented altogether. Up to twelve questions share one context, each seeing the context and itself
only. Attention heads start from weights that already look back and match
(`tools/pocket/circuits.py`): copying is refined, not discovered. Two heads are told besides where
to look: one at the name that governs a token, one at the token to say next.
Weights are stored in bfloat16, the values they were rounded to; fp32 computes on them exactly.
{note}
Documentation of these packages was trained on; the licences are those that the wheels declare
(`data` checks it):

| package | version | licence |
|---|---|---|
{packages}

## Limits

- Only the question forms of `tools/pocket/questions.py`, in English and Chinese, and close kin.
- Only `### path (package==version)` blocks; the first exception, example or related name, not all.
- Where the table is low, two things go wrong: the span of another API in the same context is
  copied (first sentences above all), or a copy slips into other words on the way.
- An answer is a quotation, not a judgement; whether the documentation is right it can't know.
"""


def write(folder: Path, table: str, per_cell: int, note: str) -> None:
    """Write `MODEL_CARD.md` beside the weights in `folder`."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        made = weights.metadata()
        parameters = sum(weights.get_tensor(name).numel() for name in names)
    packages = "\n".join(
        f"| {name} | {version} | {licence} |" for name, version, licence in TRAINING
    )
    text = CARD.format(
        parameters=parameters / 1e6,
        held_out=", ".join(f"{name} {version}" for name, version, _ in HELD_OUT),
        per_cell=per_cell,
        table=table,
        steps=made["steps"],
        minutes=round(int(made["train_s"]) / 60),
        packages=packages,
        note=f"\n{note}\n" if note else "",
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")

"""Prompts and ids are those of AutoTokenizer, for chat templates of many shapes."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from models import example_records, make_tokenizer
from ragfleet.engines.protocol import PromptSettings
from ragfleet.prompts import build_messages
from ragfleet.tokens import load_tokenizer

CLOCK = "2026-02-03T04:05:06"
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "blocks": """
{%- set ns = namespace(count=0, first=true) -%}
{{ bos_token }}
    {% for message in messages %}
        {% if message['role'] == 'system' %}
    SYS {{ message['content'] | trim }}
            {% continue %}
        {% endif %}
        {% set ns.count = ns.count + 1 %}
{{ message.role | upper }} {{ loop.index0 }}/{{ ns.count }}: {{ message.content }}
        {% if loop.last %}{% break %}{% endif %}
    {% endfor %}
{% generation %}{{ eos_token }}{% endgeneration %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}
""",
    "tools": "{%- if tools is none and documents is none %}none {% endif -%}"
    "{{ messages | tojson }}{{ {'文': '<é>'} | tojson(indent=2) }}{{ dict(a=1) }}"
    "{% macro show(m) %}[{{ m.role }}]{{ m.content[:5] }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "dated": "Today is {{ strftime_now('%d %B %Y') }}. {{ pad_token }}{{ messages[-1].content }}"
    "{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n{% endif %}",
    "undefined": "{{ nothing }}{{ messages[0].nothing is defined }}{{ messages[-1]['content'] }}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "--vocab_size", "600")


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


class _FrozenDatetime(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _FrozenDatetime:
        return cls.fromisoformat(CLOCK)


def with_template(folder: Path, out: Path, layout: str, template: str | None) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    if template is not None and layout == "file":
        (out / "chat_template.jinja").write_text(template)
        config["chat_template"] = "not this one"
    elif template is not None and layout == "named":
        config["chat_template"] = [
            {"name": "default", "template": template},
            {"name": "rag", "template": "not this one"},
        ]
    elif template is not None:
        config["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("layout", ["config", "file", "named"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_prompts(
    folder: Path, tmp_path: Path, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", _FrozenDatetime)
    path = with_template(folder, tmp_path / "m", layout, TEMPLATES[name])
    theirs, ours = reference(path), load_tokenizer(path)
    settings = PromptSettings(
        system_prompt="System. ", clock=CLOCK, chat_template_kwargs={"thinking": False}
    )
    for record in example_records(5):
        messages = build_messages(
            settings, record, record["query"], record["context"], record["retrieval_method"]
        )
        if name in ("dated", "undefined"):  # they have no system message: ours goes to the user's
            messages = messages[1:]
        text, add_special_tokens = ours.render(messages, settings)
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, thinking=False
        )
        assert text == expected
        expected_ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, thinking=False
        )["input_ids"]
        ids = ours.encode(text, add_special_tokens)
        assert ids == expected_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_plain_prompts(folder: Path, tmp_path: Path) -> None:
    path = with_template(folder, tmp_path / "m", "config", None)
    theirs, ours = reference(path), load_tokenizer(path)
    settings = PromptSettings(system_prompt="System.")
    for record in example_records(5):
        messages = build_messages(settings, record, record["query"], record["context"], None)
        text, add_special_tokens = ours.render(messages, settings)
        ids = ours.encode(text, add_special_tokens)
        assert ids == theirs(text)["input_ids"]
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.pad_id == theirs.pad_token_id


def test_tokens_that_only_the_configuration_knows(folder: Path, tmp_path: Path) -> None:
    path = with_template(folder, tmp_path / "m", "config", None)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "600": {"content": "<extra>", "special": True},
        "601": {"content": "<word>", "special": False},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = reference(path), load_tokenizer(path)
    text = "a <extra> b<word>c <|im_end|>"
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_folder_without_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    path = with_template(folder, tmp_path / "m", "config", "{{ messages[0].content }}")
    file = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(file["model"]["vocab"]))
    merges = [" ".join(merge) for merge in file["model"]["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"})
    )
    ours = load_tokenizer(path)
    assert any("no tokenizer.json" in note for note in ours.notes)
    text, add_special_tokens = ours.render(
        [{"role": "user", "content": "numpy.sort 排序"}], PromptSettings(system_prompt="")
    )
    ids = ours.encode(text, add_special_tokens)
    assert ids == load_tokenizer(folder).encode(text, add_special_tokens=False)
    assert ours.decode(ids) == "numpy.sort 排序"
    assert 3 in ours.eos_ids

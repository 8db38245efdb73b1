"""Tokenizers read without torch, and prompts that fit. Equality with transformers is a contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import make_tokenizer
from ragfleet.engines.protocol import (
    Failure,
    Prepared,
    PromptSettings,
    Request,
    SamplingParams,
)
from ragfleet.errors import ModelError
from ragfleet.model_files import context_limit
from ragfleet.tokens import PromptTokenizer, load_tokenizer, prepare_prompt

TEXTS = [
    "numpy.sort returns a sorted copy of an array. ",
    "返回数组的排序副本。",
    "def f(x): return x",
]
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def settings(**changes: object) -> PromptSettings:
    return PromptSettings(**{"system_prompt": "Be brief.", **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(path, "--vocab_size", "400", texts=TEXTS * 5)


def variant(folder: Path, out: Path, template: str | None = None, **config: object) -> Path:
    """A copy of the tokenizer with another chat template or configuration."""
    out.mkdir()
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    base = json.loads((folder / "tokenizer_config.json").read_text())
    base.pop("chat_template")
    if template is not None:
        base["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps({**base, **config}))
    return out


def test_chat_template_writes_its_own_special_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text, add_special_tokens = tokenizer.render(MESSAGES, settings())
    assert text == (
        "<|bos|><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not add_special_tokens
    ids = tokenizer.encode(text, add_special_tokens)
    assert ids[:2] == [1, 2]
    assert "<|" not in tokenizer.decode(ids)
    assert tokenizer.eos_ids == (3,)
    assert tokenizer.pad_id == 0


def test_without_a_chat_template_the_tokenizer_adds_bos(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(variant(folder, tmp_path / "plain"))
    text, add_special_tokens = tokenizer.render(MESSAGES, settings())
    assert (text, add_special_tokens) == ("S\n\nU\nAnswer:", True)
    assert tokenizer.encode(text, add_special_tokens)[0] == 1


def test_truncation_and_padding_of_the_file_are_switched_off(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = variant(folder, tmp_path / "cut")
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    file.enable_truncation(max_length=4)
    file.enable_padding(length=64, pad_id=0, pad_token="<|pad|>")
    file.save(str(path / "tokenizer.json"))
    ids = load_tokenizer(path).encode(TEXTS[0] * 2, add_special_tokens=False)
    assert ids == load_tokenizer(folder).encode(TEXTS[0] * 2, add_special_tokens=False)
    assert len(ids) > 4


@pytest.mark.parametrize("layout", ["jinja", "named", "json"])
def test_where_chat_templates_are_found(folder: Path, tmp_path: Path, layout: str) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path = variant(folder, tmp_path / "m", **({"chat_template": named} if layout != "json" else {}))
    if layout == "jinja":  # wins over the config
        (path / "chat_template.jinja").write_text("J")
    if layout == "json":
        (path / "chat_template.json").write_text('{"chat_template": "P"}')
    assert load_tokenizer(path).chat_template == {"jinja": "J", "named": "D", "json": "P"}[layout]


def test_the_clock_of_chat_templates_is_frozen(folder: Path, tmp_path: Path) -> None:
    path = variant(folder, tmp_path / "m", "{{ strftime_now('%d %b %Y') }}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.uses_clock
    assert not load_tokenizer(folder).uses_clock
    text, _ = tokenizer.render(MESSAGES, settings(clock="2026-02-03T04:05:06"))
    assert text == "03 Feb 2026"


def test_chat_template_kwargs_reach_the_template(folder: Path, tmp_path: Path) -> None:
    path = variant(folder, tmp_path / "m", "{{ enable_thinking }} {{ bos_token }}")
    tokenizer = load_tokenizer(path)
    text, _ = tokenizer.render(MESSAGES, settings(chat_template_kwargs={"enable_thinking": False}))
    assert text == "False <|bos|>"


REFUSES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
REFUSES += "{% endif %}{{ m.content }}{% endfor %}"
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_templates_without_a_system_role(folder: Path, tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(variant(folder, tmp_path / "m", template))
    assert tokenizer.render(MESSAGES, settings())[0] == "S\n\nU"
    assert any("no system message" in note for note in tokenizer.notes)


def test_eos_ids_of_every_source(folder: Path, tmp_path: Path) -> None:
    path = variant(folder, tmp_path / "m")
    (path / "config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(path).eos_ids == (3, 9)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(path).eos_ids == (3, 7, 8)


def test_named_tokens_are_special_even_if_the_file_says_otherwise(
    folder: Path, tmp_path: Path
) -> None:
    path = variant(folder, tmp_path / "m")
    file = json.loads((path / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        token["special"] = False
    (path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b", add_special_tokens=False)) == "ab"
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [3]


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    path = variant(folder, tmp_path / "broken")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(path)
    (path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: holds no JSON object"):
        load_tokenizer(path)


def test_torch_is_not_imported(folder: Path) -> None:
    code = (
        "import sys, pathlib, ragfleet.tokens as t\n"
        "from ragfleet.engines.protocol import PromptSettings\n"
        f"k = t.load_tokenizer(pathlib.Path({str(folder)!r}))\n"
        "k.render([{'role': 'user', 'content': 'x'}], PromptSettings(system_prompt=''))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 8, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 8),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({}, None),
    ],
)
def test_context_limit(tmp_path: Path, config: dict[str, object], limit: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_limit(tmp_path) == limit


# ---- prompts that fit -------------------------------------------------------------------------

CONTEXT = " ".join(f"word{index} 排序{index}" for index in range(300))


def request(context: str = CONTEXT, query: str = "What does it return?") -> Request:
    record = {"id": "a", "query": query, "context": context}
    return Request(key=b"k", query=query, context=context, retrieval_method=None, record=record)


def prepare(
    tokenizer: PromptTokenizer,
    max_model_len: int | None,
    max_new_tokens: int = 10,
    asked: Request | None = None,
    **changes: object,
) -> Prepared | Failure:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return prepare_prompt(
        asked or request(), settings(**changes), tokenizer, sampling, max_model_len
    )


def test_a_prompt_that_fits_exactly(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    free = prepare(tokenizer, None)
    assert isinstance(free, Prepared)
    length = len(free.token_ids)
    assert prepare(tokenizer, length + 10) == free
    failure = prepare(tokenizer, length + 9)
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"
    assert str(length) in failure.error
    assert str(length + 9) in failure.error


@pytest.mark.parametrize("side", ["head", "tail"])
@pytest.mark.parametrize("budget", [120, 333, 1000, 1001, 1002, 1003])
def test_truncation_keeps_all_but_the_context(folder: Path, side: str, budget: int) -> None:
    tokenizer = load_tokenizer(folder)
    prepared = prepare(tokenizer, budget + 10, truncate_context=side)
    assert isinstance(prepared, Prepared)
    assert budget - 4 <= len(prepared.token_ids) <= budget
    assert prepared.truncated_tokens > 0
    head, tail = (
        "<|im_start|>user\nDocumentation:\n\n",
        "\n\nQuestion: What does it return?<|im_end|>",
    )
    kept = prepared.prompt.split(head)[1].split(tail)[0]
    assert prepared.prompt.count("Question: What does it return?") == 1
    assert "�" not in kept
    assert kept
    assert CONTEXT.endswith(kept) if side == "head" else CONTEXT.startswith(kept)


@pytest.mark.parametrize("side", ["head", "tail"])
def test_a_question_too_long_for_the_model(folder: Path, side: str) -> None:
    tokenizer = load_tokenizer(folder)
    failure = prepare(
        tokenizer, 60, asked=request(query="long question " * 50), truncate_context=side
    )
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"
    assert "without its context" in failure.error


def test_truncation_reaches_templates_that_use_the_record(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    template = "{{ record.context }}\nQ: {{ query }}"
    prepared = prepare(tokenizer, 200, template=template, truncate_context="tail")
    assert isinstance(prepared, Prepared)
    assert len(prepared.token_ids) <= 190


def test_a_line_of_megabytes_is_refused_by_its_begin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folder)
    lengths: list[int] = []
    encode = tokenizer._backend.encode

    def counted(text: str, add_special_tokens: bool) -> list[int]:
        lengths.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer._backend, "encode", counted)
    failure = prepare(tokenizer, 2000, asked=request("numpy.mean " * 500_000))
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"
    assert " tokens and more and --max_new_tokens is " in failure.error
    assert "Use --truncate_context" in failure.error
    assert max(lengths) < 100_000
    asked = request("numpy.mean " * 20_000)
    cut = prepare(tokenizer, 2000, asked=asked, truncate_context="tail")
    assert isinstance(cut, Prepared), "what is cut is not refused, however long"
    assert cut.truncated_tokens > 20_000
    # Few tokens for so much text: only the whole can tell.
    monkeypatch.setattr("ragfleet.tokens._FAR", 1)
    monkeypatch.setattr("ragfleet.tokens._LEAST_FAR", 1)
    free = prepare(tokenizer, None)
    assert isinstance(free, Prepared)
    length = len(free.token_ids)
    assert length < len(free.prompt)
    assert prepare(tokenizer, length + 10) == free


def test_template_errors_fail_the_record_alone(folder: Path, tmp_path: Path) -> None:
    failure = prepare(load_tokenizer(folder), None, template="{{ nothing }}")
    assert isinstance(failure, Failure)
    assert (failure.error_type, failure.retryable) == ("invalid_record", False)
    assert "nothing" in failure.error
    broken = load_tokenizer(variant(folder, tmp_path / "m", "{{ raise_exception('bad roles') }}"))
    failure = prepare(broken, None)
    assert isinstance(failure, Failure)
    assert "bad roles" in failure.error


def test_text_that_is_not_unicode_fails_the_record_alone(folder: Path) -> None:
    failure = prepare(load_tokenizer(folder), None, asked=request(query="a\ud800b"))
    assert isinstance(failure, Failure)
    assert failure.error_type == "invalid_record"


def test_an_empty_prompt_is_refused(folder: Path, tmp_path: Path) -> None:
    failure = prepare(load_tokenizer(variant(folder, tmp_path / "m", "{# nothing #}")), None)
    assert isinstance(failure, Failure)
    assert "empty" in failure.error

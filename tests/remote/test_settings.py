"""Flags of remote APIs: what means something, what is refused, where the key comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_server import KEY

from ragfleet import combinations
from ragfleet.config import RunConfig
from ragfleet.engines.protocol import PromptSettings, Request, SamplingParams
from ragfleet.errors import ConfigError
from ragfleet.preparation import remote_parts, remote_spec
from ragfleet.remote.asking import LengthField, RemotePrepared, common_body, prepare
from ragfleet.remote.secret import ApiKey, read_key
from ragfleet.remote.spec import RemoteSpec


def config(**changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"contexts_file": "a.jsonl", "output_file": "b.jsonl"}
    return RunConfig(**{**settings, "api_model_name": "m", **changes})


def spec_of(inference_type: str) -> RemoteSpec:
    spec = remote_spec(config(inference_type=inference_type), {})
    assert spec is not None
    return spec


def test_every_row_of_the_table_can_be_configured() -> None:
    for (inference_type, hf_mode), engines in combinations.TABLE.items():
        for engine, modes in engines.items():
            for mode in modes:
                remote = {"api_mode": mode} if mode else {"api_model_name": None}
                made = config(
                    inference_type=inference_type,
                    hf_mode=hf_mode or "local",
                    engine=engine,
                    model_path="m",
                    **remote,
                )
                assert made.is_remote == bool(mode)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inference_type": "local", "model_path": "m"}, "--api_model_name is for remote APIs"),
        ({"inference_type": "openai", "engine": "transformers"}, "does not go with --engine"),
        ({"inference_type": "openai", "engine": "echo"}, "echo uses no model"),
        ({"inference_type": "openai", "hf_mode": "endpoint"}, "belongs to --inference_type hugg"),
        (
            {"inference_type": "huggingface", "hf_mode": "endpoint", "api_mode": "batch"},
            "has no --api_mode batch",
        ),
        ({"inference_type": "openai", "precision": "bf16"}, "--precision does not go with"),
        ({"inference_type": "openai", "truncate_context": "tail"}, "only the server has"),
        ({"inference_type": "openai", "batch_size": 4}, "use --max_concurrency"),
        ({"inference_type": "openai", "api_model_name": None}, "--api_model_name is missing"),
        ({"inference_type": "openai", "base_url": "http://user:pw@h/v1"}, "keys belong into"),
        ({"inference_type": "openai", "base_url": "h:80"}, "must look like"),
        ({"inference_type": "openai", "max_cost": 1.0}, "needs --price_in"),
        ({"inference_type": "openai", "api_mode": "batch", "num_workers": 2}, "one worker"),
        ({"inference_type": "openai", "max_concurrency": 0}, "at least 1"),
        (
            {"inference_type": "openai", "extra_body": {"max_tokens": 9}},
            "use --max_new_tok",
        ),
        ({"inference_type": "togetherai", "extra_body": {"messages": []}}, "sets messages itself"),
        ({"inference_type": "openai", "extra_body": {"n": 2}}, "sets n itself; leave it out"),
        ({"inference_type": "openai", "extra_body": {"a": [{"b": float("nan")}]}}, "a holds NaN"),
        ({"inference_type": "openai", "extra_body": {"a": float("inf")}}, "a holds NaN"),
        (
            {"inference_type": "openai", "extra_body": {"Api-Key": "pw"}},
            "Api-Key looks like a key.*belong into the environment",
        ),
        (
            {
                "inference_type": "openai",
                "extra_body": {"a": [{"headers": {"access_token": "pw"}}]},
            },
            "access_token looks like a key",
        ),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        config(**changes)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("api_format", ["chat", "completion"])
@pytest.mark.parametrize("length_field", ["max_tokens", "max_completion_tokens"])
def test_whatever_a_request_has_is_refused_in_the_extra_body(
    api_format: Any, length_field: LengthField
) -> None:
    made = config(inference_type="openai", api_format=api_format, stop=("x",), seed=1)
    spec = remote_spec(made, {})
    assert spec is not None
    settings = PromptSettings(system_prompt="s", chat_template_kwargs={"enable_thinking": False})
    request = Request(
        key=bytes(16), record={}, query="q", context="c", retrieval_method=None, seed=1
    )
    prepared = prepare(request, settings, spec)
    assert isinstance(prepared, RemotePrepared)
    body = common_body(
        spec, settings, SamplingParams(max_new_tokens=9, temperature=1, stop=("x",)), length_field
    )
    for name in {**body, **prepared.own}:
        with pytest.raises(ConfigError, match=f"--extra_body: ragfleet sets {name} itself"):
            made.replace(extra_body={"reasoning_effort": "low", name: None})
    schema = {"properties": {"password": {"type": "string"}}}
    for body in ({"top_k": 1}, {"guided_json": schema}, {"secret": False}):
        assert made.replace(extra_body=body).extra_body == body


def test_a_run_is_told_by_server_and_model_and_never_by_its_key(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    first = config(inference_type="openai", base_url="http://h/v1/", api_key_file=key_file)
    spec = remote_spec(first, {})
    assert spec is not None
    assert KEY not in repr(spec)
    read = read_key(spec, {})
    assert read is not None
    assert read.reveal() == KEY
    same = remote_spec(config(inference_type="openai", base_url="http://h/v1"), {})
    other = remote_spec(config(inference_type="openai", base_url="http://i/v1"), {})
    assert same is not None
    assert other is not None
    assert remote_parts(spec) == remote_parts(same) != remote_parts(other)


@pytest.mark.parametrize("inference_type", ["openai", "togetherai"])
def test_a_missing_key_says_what_to_set(inference_type: str) -> None:
    with pytest.raises(ConfigError, match=r"_API_KEY in the environment.*--api_key_file"):
        read_key(spec_of(inference_type), {})


def test_a_key_is_not_shown() -> None:
    key = ApiKey(KEY)
    assert KEY not in f"{key} {key!r}"
    assert key.redact(f"bad {KEY}!") == "bad (API key)!"
    assert key.redact(f"bad {KEY[:-1]}") == "bad (API key)", "where a long reply was cut"
    assert key.redact("it begins with sk-") == "it begins with sk-"
    with pytest.raises(ConfigError) as caught:
        read_key(spec_of("openai"), {"OPENAI_API_KEY": f"{KEY} x"})
    assert KEY not in str(caught.value)

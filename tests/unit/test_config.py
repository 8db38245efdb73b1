"""The settings: their defaults, where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ragfleet.arguments import parse_config
from ragfleet.cli import main
from ragfleet.config import RunConfig
from ragfleet.errors import ConfigError

NEEDED = ["--contexts_file", "c.jsonl", "--output_file", "o.jsonl", "--model_path", "m"]


def parsed(*arguments: str) -> RunConfig:
    config = parse_config([*NEEDED, *arguments], "ragfleet infer")
    assert config is not None
    return config


def config_of(**settings: Any) -> RunConfig:
    return RunConfig(
        contexts_file=Path("c"), output_file=Path("o"), **{"model_path": "m"} | settings
    )


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> tuple[str, str]:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return "--config", str(path)

    return write


# ---- defaults


DEFAULTS = {
    "model_path": None,
    "inference_type": "local",
    "max_new_tokens": 512,
    "temperature": 0.2,
    "top_p": 0.95,
    "max_samples_per_worker": None,
    "verbose": False,
    "engine": "auto",
    "num_workers": None,
    "total_gpus": None,
    "gpus_per_worker": None,
    "gpu_pick": "free",
    "device": "auto",
    "precision": "auto",
    "seed": None,
    "stop": (),
    "batch_size": None,
    "prefix_sharing": "auto",
    "kv_cache_bytes": None,
    "engine_options": {},
    "max_model_len": None,
    "truncate_context": "error",
    "prompt_template": None,
    "system_prompt": None,
    "chat_template_kwargs": {},
    "schedule": "dynamic",
    "dedup": "auto",
    "failed_contexts": "row",
    "include_context": False,
    "max_retries": None,
    "request_timeout_s": None,
    "start_timeout_s": 1800.0,
    "stall_timeout_s": 300.0,
    "fsync_s": 1.0,
    "max_restarts": 3,
    "retry_failed": False,
    "overwrite": False,
    "remove_shards": False,
    "fail_on_errors": False,
    "private": False,
    "trust_remote_code": False,
    "inference_class": None,
    "hf_mode": "local",
    "api_model_name": None,
    "base_url": None,
    "api_key_file": None,
    "api_key_env": None,
    "api_format": "chat",
    "api_mode": "realtime",
    "extra_body": {},
    "max_concurrency": None,
    "max_requests_per_minute": None,
    "max_tokens_per_minute": None,
    "price_in": None,
    "price_out": None,
    "max_cost": None,
    "max_tokens_total": None,
    "max_outage_s": 3600.0,
    "batch_poll_s": 30.0,
}
"""The documented surface: whoever changes it changes the documents and the change log too."""


def test_the_flags_and_their_defaults_are_the_documented_ones() -> None:
    found = {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(RunConfig)
    }
    assert found.pop("contexts_file") is dataclasses.MISSING
    assert found.pop("output_file") is dataclasses.MISSING
    assert found == DEFAULTS


def test_a_bare_command_line_gives_the_defaults() -> None:
    found = dataclasses.asdict(parsed())
    assert found.pop("contexts_file") == Path("c.jsonl")
    assert found.pop("output_file") == Path("o.jsonl")
    assert found == {**DEFAULTS, "model_path": "m"}


def test_a_configuration_can_not_be_changed() -> None:
    config = parsed()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert config.replace(seed=1).seed == 1
    assert config.seed is None


# ---- the command line


def test_hyphens_and_underscores_are_one() -> None:
    with_underscores = parsed("--max_new_tokens", "7", "--fail_on_errors", "--top_p=0.5")
    with_hyphens = parsed("--max-new-tokens", "7", "--fail-on-errors", "--top-p=0.5")
    assert with_underscores == with_hyphens
    assert with_hyphens.max_new_tokens == 7
    assert with_hyphens.fail_on_errors


def test_the_last_of_two_equal_options_wins() -> None:
    assert parsed("--seed", "1", "--seed", "2").seed == 2
    assert parsed("--verbose", "--no_verbose").verbose is False
    assert parsed("--stop", "a", "b", "--stop", "c").stop == ("c",)


def test_values_may_be_negative_chinese_or_begin_with_a_dash() -> None:
    assert parsed("--system_prompt", "用中文回答").system_prompt == "用中文回答"
    assert parsed("--system_prompt=--brief").system_prompt == "--brief"
    assert parsed("--system_prompt", "").system_prompt == ""
    assert parsed("--stop", "\n\n", "END").stop == ("\n\n", "END")


def test_an_option_of_json() -> None:
    found = parsed("--chat_template_kwargs", '{"enable_thinking": false, "n": [1]}')
    assert found.chat_template_kwargs == {"enable_thinking": False, "n": [1]}


@pytest.mark.parametrize("value", ["[1]", "{", "null", "thinking=false"])
def test_an_option_of_json_must_be_an_object(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--chat_template_kwargs", value)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "chat_template_kwargs" in error
    assert "not JSON" in error or "not a JSON object" in error


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--temprature", "--temperature"),
        ("--max-new-token", "--max_new_tokens"),
        ("--contexts_files", "--contexts_file"),
        ("--numworkers", "--num_workers"),
    ],
)
def test_an_unknown_option_names_the_nearest(
    typo: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(typo, "1")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert typo in error
    assert meant in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed"],
        ["--seed", "many"],
        ["--engine", "tensorrt"],
        ["--precision", "int4"],
        ["stray"],
        ["--inference_type", "remote"],
    ],
)
def test_nonsense_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--output_file", "o"], "ragfleet infer")
    assert stop.value.code == 2
    assert "--contexts_file" in capsys.readouterr().err


def test_help_is_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_config(["--help"], "ragfleet infer") is None
    text = capsys.readouterr().out
    for name in DEFAULTS:
        assert f"--{name}" in text


def test_a_plan_needs_no_output_file() -> None:
    for given in (["--contexts_file", "c"], ["--contexts-file=c"]):
        config = parse_config([*given, "--model_path", "m"], "ragfleet plan", plan=True)
        assert config is not None
        assert config.output_file == Path("results.jsonl")
    for named in (["--output_file", "x"], ["--output-file=x"]):
        arguments = ["--contexts_file", "c", "--model_path", "m", *named]
        config = parse_config(arguments, "ragfleet plan", plan=True)
        assert config is not None
        assert config.output_file == Path("x")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infr"]) == 2
    assert "Did you mean infer?" in capsys.readouterr().err


def test_an_error_of_use_exits_with_2_and_one_clear_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["infer", *NEEDED, "--top_p", "0"]) == 2
    error = capsys.readouterr().err
    assert error == "ragfleet: --top_p is 0.0; it must be above 0 and at most 1.\n"


# ---- TOML


def test_toml_gives_any_setting_and_the_command_line_wins(toml: Any) -> None:
    config_file = toml(
        """
        max_new_tokens = 7
        temperature = 0
        top-p = 0.5
        verbose = true
        fail_on_errors = true
        system_prompt = "用中文"
        stop = ["a", "b c"]
        chat_template_kwargs = {enable_thinking = false}
        output_file = "from.toml"
        """
    )
    found = parse_config(
        [*NEEDED[:2], *NEEDED[4:], *config_file, "--max-new-tokens", "9", "--no_verbose"],
        "ragfleet infer",
    )
    assert found is not None
    assert found.contexts_file == Path("c.jsonl")
    assert found.max_new_tokens == 9
    assert found.temperature == 0.0
    assert found.top_p == 0.5
    assert found.verbose is False
    assert found.fail_on_errors is True
    assert found.system_prompt == "用中文"
    assert found.stop == ("a", "b c")
    assert found.chat_template_kwargs == {"enable_thinking": False}
    assert found.output_file == Path("from.toml")
    assert parsed(*config_file, "--stop", "z").stop == ("z",)


def test_toml_may_begin_with_a_byte_order_mark(toml: Any) -> None:
    assert parsed(*toml("\ufeffseed = 4")).seed == 4


def test_the_command_line_wins_wherever_config_stands(toml: Any) -> None:
    config_file = toml("seed = 1")
    for arguments in (
        [*config_file, *NEEDED, "--seed", "2"],
        [*NEEDED, "--seed", "2", *config_file],
        [*NEEDED, "--seed", "2", f"--config={config_file[1]}"],
    ):
        found = parse_config(arguments, "ragfleet infer")
        assert found is not None
        assert found.seed == 2


def test_every_setting_survives_toml(toml: Any) -> None:
    given = {
        **DEFAULTS,
        "model_path": "m",
        "max_samples_per_worker": 3,
        "seed": 5,
        "stop": ("--- end", "x"),
        "system_prompt": "--brief",
        "chat_template_kwargs": {"a": {"b": [1, "文"]}},
        "request_timeout_s": 1.5,
        "max_model_len": 9999,
        "overwrite": True,
        "inference_class": "my.py:Mine",
        "prompt_template": "t.jinja",
    }
    text = "\n".join(
        f"{name} = {as_toml(value)}" for name, value in given.items() if value is not None
    )
    found = dataclasses.asdict(parsed(*toml(text)))
    assert found["prompt_template"] == Path("t.jinja")
    assert found == {
        **given,
        "prompt_template": Path("t.jinja"),
        "contexts_file": Path("c.jsonl"),
        "output_file": Path("o.jsonl"),
    }


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature = 1", "there is no setting temprature. Did you mean temperature?"),
        ("[infer]\nseed = 1", "there is no setting infer"),
        ("seed = ", "is not valid TOML"),
    ],
)
def test_a_wrong_toml_is_told(toml: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml") as caught:
        parsed(*toml(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = true", "seed is true; it must be a whole number."),
        ("seed = [1, 2]", "seed is [1, 2]; it must be a whole number."),
        ("seed = 1.5", "seed is 1.5; it must be a whole number."),
        ("num_workers = 'many'", 'num_workers is "many"; it must be a whole number or auto.'),
        ("temperature = 'hot'", 'temperature is "hot"; it must be a number.'),
        ("top-p = {a = 1}", 'top-p is {"a": 1}; it must be a number.'),
        ("verbose = 'yes'", 'verbose is "yes"; it must be true or false.'),
        ("overwrite = 1", "overwrite is 1; it must be true or false."),
        ("device = 'gpu'", 'device is "gpu"; it must be auto or cpu.'),
        ("model_path = ['a', 'b']", 'model_path is ["a", "b"]; it must be a string.'),
        ("prompt_template = false", "prompt_template is false; it must be a path."),
        ("stop = {a = 1}", 'stop is {"a": 1}; it must be a list of strings.'),
        ("extra_body = 'x'", 'extra_body is "x"; it must be a table.'),
        ("extra_body = '[]'", 'extra_body is "[]"; it must be a table.'),
    ],
)
def test_toml_of_the_wrong_type_is_told_as_it_stands_there(
    toml: Any, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml") as caught:
        parsed(*toml(text))
    assert str(caught.value).endswith(f"run.toml: {message}")


def test_toml_of_another_type_that_says_the_same_is_taken(toml: Any) -> None:
    found = parsed(
        *toml(
            """
            stop = 'a'
            seed = '7'
            num_workers = 'auto'
            temperature = '0.5'
            max_model_len = 'None'
            inference_type = 'openai'
            api_model_name = 70
            extra_body = '{"a": 1}'
            """
        )
    )
    assert (found.stop, found.seed, found.num_workers) == (("a",), 7, "auto")
    assert (found.temperature, found.max_model_len, found.api_model_name) == (0.5, None, "70")
    assert found.extra_body == {"a": 1}


def test_toml_that_is_not_there_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml can't be read: No such file or directory\.$"):
        parsed("--config", str(tmp_path / "none.toml"))
    (tmp_path / "gbk.toml").write_bytes('system_prompt = "怎么"'.encode("gbk"))
    with pytest.raises(ConfigError, match="can't be read: it is not UTF-8"):
        parsed("--config", str(tmp_path / "gbk.toml"))
    with pytest.raises(ConfigError, match="--config needs"):
        parsed("--config")


# ---- what means nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "--num_workers is 0; it must be at least 1"),
        ({"gpus_per_worker": 0}, "--gpus_per_worker is 0"),
        ({"max_samples_per_worker": 0}, "--max_samples_per_worker is 0"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"max_model_len": 0}, "--max_model_len is 0"),
        ({"total_gpus": -1}, "--total_gpus is -1; it must be at least 0"),
        ({"max_retries": -1}, "--max_retries is -1"),
        ({"max_restarts": -1}, "--max_restarts is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_p": 0}, "--top_p is 0"),
        ({"top_p": 1.1}, "--top_p is 1.1"),
        ({"top_p": float("nan")}, "--top_p is nan"),
        ({"request_timeout_s": 0}, "--request_timeout_s is 0"),
        ({"stop": ("a", "")}, "--stop holds an empty string"),
        ({"system_prompt": "\udcd4"}, "--system_prompt is not UTF-8"),
        ({"stop": ("a", "\udcd4")}, "--stop is not UTF-8"),
        ({"inference_type": "togetherai", "model_path": None}, "--api_model_name is missing"),
        ({"model_path": None}, "--model_path is missing: name a model folder."),
        ({"model_path": None, "inference_type": "huggingface"}, "folder or Hub id"),
        ({"engine": "echo", "inference_type": "huggingface"}, "leave --inference_type out"),
        ({"device": "cpu", "total_gpus": 2}, "--device cpu uses no GPU, but --total_gpus is 2"),
        ({"device": "cpu", "gpus_per_worker": 1}, "--gpus_per_worker is 1"),
        ({"num_workers": "many"}, "--num_workers is 'many'; it must be a number or auto"),
        ({"engine": "echo", "total_gpus": 2}, "--engine echo uses no GPU, but --total_gpus is 2"),
        ({"engine": "echo", "gpus_per_worker": 1}, "--gpus_per_worker is 1; leave it out"),
        ({"overwrite": True, "retry_failed": True}, "nothing for --retry_failed to try again"),
        (
            {"num_workers": "auto", "max_samples_per_worker": 5},
            "the machine would decide which; give the number",
        ),
        ({"inference_class": "mine"}, "must be file.py:ClassName"),
        ({"inference_class": "mine.py:not a name"}, "must be file.py:ClassName"),
        ({"stall_timeout_s": math.inf}, "it must be at most 3155760000 seconds"),
        ({"fsync_s": 1e300}, "--fsync_s is 1e+300; it must be at most"),
        ({"temperature": math.inf}, "--temperature is inf; it must be a finite number"),
        ({"max_model_len": 512}, "leaves no room for a prompt"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**settings)
    assert message in str(caught.value)


def test_settings_that_mean_something() -> None:
    config_of(model_path=None, engine="echo")
    config_of(model_path=None, inference_class="a:b/c.py:Mine")
    config_of(device="cpu", total_gpus=0)
    config_of(temperature=0, top_p=1, seed=0, max_retries=0, max_restarts=0)


def test_python_may_give_strings_lists_and_whole_numbers() -> None:
    config = RunConfig(contexts_file="c", output_file="o", model_path="m", stop=["a"])  # type: ignore[arg-type]
    assert config.contexts_file == Path("c")
    assert config.stop == ("a",)
    assert [repr(config_of(temperature=0).temperature), repr(config_of(top_p=1).top_p)] == [
        "0.0",
        "1.0",
    ], "0 and 0.0 are one run"


def test_equal_records_are_answered_one_by_one_only_when_sampling_or_told() -> None:
    assert config_of(temperature=0.2).distinct_samples
    assert config_of(temperature=0, dedup="off").distinct_samples
    assert not config_of(temperature=0).distinct_samples


def test_a_tilde_that_no_shell_has_replaced_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--prompt_template ~/a/t\.jinja: no shell has put"):
        config_of(prompt_template="~/a/t.jinja")
    for text in ("~t.jinja", "a/~/t.jinja"):
        assert config_of(prompt_template=text).prompt_template == Path(text)

"""What is told about vLLM without importing it: versions, option names, the choice of `auto`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragfleet import RunConfig
from ragfleet.engines import vllm_settings
from ragfleet.engines.protocol import EngineSpec, PromptSettings, SamplingParams
from ragfleet.engines.vllm_options import (
    InstalledVllm,
    answers_depend_on,
    check_options,
    choose_engine,
    find_vllm,
    option_names,
)
from ragfleet.errors import ConfigError, DeviceError
from ragfleet.gpus import GIB, GpuInventory, fake_inventory
from ragfleet.preparation import options_part

NAMES = frozenset({"max_num_seqs", "max_num_batched_tokens", "quantization", "load_format"})


def installed(version: str = "0.32.0", is_cpu_build: bool = False) -> InstalledVllm:
    return InstalledVllm(version=version, folder=Path("/nowhere"), is_cpu_build=is_cpu_build)


def fake_package(folder: Path, version_file: str) -> None:
    """A vllm that raises when anybody imports it."""
    (folder / "vllm" / "engine").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "vllm" / "_version.py").write_text(version_file)
    (folder / "vllm" / "engine" / "arg_utils.py").write_text(
        "from torch import nothing\n"
        "class Other:\n    ignored: int = 1\n"
        "class EngineArgs:\n    model: str = 'x'\n    max_num_seqs: int | None = None\n"
        "    def __post_init__(self): pass\n"
    )


@pytest.mark.parametrize(
    ("source", "version", "is_cpu_build"),
    [
        ("__version__ = version = '0.32.0+cpu'\n", "0.32.0+cpu", True),
        ("__version__ = '0.29.1'\n", "0.29.1", False),
        ("version = '0.1.dev5'\n", "0.1.dev5", False),
    ],
)
def test_it_is_found_and_read_without_an_import(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    version: str,
    is_cpu_build: bool,
) -> None:
    fake_package(tmp_path, source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ragfleet.engines.vllm_options._metadata_version", lambda name: None)
    found = find_vllm()
    assert found is not None
    assert (found.version, found.is_cpu_build) == (version, is_cpu_build)
    assert not found.is_too_old
    assert option_names(found.folder) == {"model", "max_num_seqs"}


def test_a_mere_folder_of_that_name_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert find_vllm() is None
    assert option_names(tmp_path) == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 3}, "has no option 'max_num_seq'; did you mean max_num_seqs"),
        ({"max-num-seqs": 3}, "did you mean max_num_seqs"),
        ({"zzz": 3}, r"has no option 'zzz'\.$"),
        ({"dtype": "float16"}, "use --precision instead"),
        ({"data_parallel_rank": 1}, "use --num_workers instead"),
        ({"generation_config": "auto"}, "leave it out"),
        ({"load_format": "pt"}, "only safetensors are loaded"),
    ],
)
def test_options_that_are_not_vllms_or_not_the_users(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(options, NAMES, "0.32.0")


def test_options_that_are() -> None:
    check_options({"max_num_seqs": 8, "quantization": "fp8"}, NAMES, "0.32.0")
    check_options({"whatever": 1}, frozenset(), "of unknown version")  # the worker checks it


@pytest.mark.parametrize(
    ("asked", "on_gpu", "found", "engine", "note"),
    [
        ("auto", True, installed(), "vllm", "vLLM 0.32.0; it is installed and there is a GPU"),
        ("auto", True, None, "transformers", "not installed"),
        ("auto", True, installed("0.9.2"), "transformers", "vLLM 0.9.2 is too old"),
        ("auto", True, installed("0.24.0"), "vllm", "vLLM 0.24.0"),
        ("auto", True, installed(is_cpu_build=True), "transformers", "is a build for the CPU"),
        ("auto", False, installed(), "transformers", "taken where there is a GPU"),
        ("auto", False, None, "transformers", None),
        ("transformers", True, installed(), "transformers", None),
        ("vllm", False, installed(is_cpu_build=True), "vllm", "vLLM 0.32.0"),
        ("vllm", True, installed(), "vllm", "vLLM 0.32.0"),
    ],
)
def test_which_engine(
    asked: str, on_gpu: bool, found: InstalledVllm | None, engine: str, note: str | None
) -> None:
    chosen, line = choose_engine(asked, on_gpu, found, {})
    assert chosen == engine
    assert (line is None) == (note is None)
    assert (note or "") in (line or "")


@pytest.mark.parametrize(
    ("asked", "on_gpu", "found", "options", "error", "message"),
    [
        ("vllm", True, None, {}, ConfigError, "which is not installed: pip install"),
        ("vllm", True, installed("0.9.2"), {}, ConfigError, "0.24 or newer is needed"),
        ("vllm", True, installed("0.23.0"), {}, ConfigError, "vLLM 0.23.0 is too old"),
        ("vllm", True, installed(is_cpu_build=True), {}, DeviceError, "install the one for GPUs"),
        (
            "auto",
            False,
            installed(),
            {"max_num_seqs": 1},
            ConfigError,
            "taken where there is a GPU",
        ),
        ("auto", False, None, {"max_num_seqs": 1}, ConfigError, "leave them out"),
    ],
)
def test_what_cannot_work(
    asked: str,
    on_gpu: bool,
    found: InstalledVllm | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        choose_engine(asked, on_gpu, found, options)


@pytest.mark.parametrize(
    "options", [{"speculative_config": {"method": "ngram"}}, {"spec_method": "ngram"}]
)
def test_seeds_and_speculative_decoding_do_not_go_together_on_the_cpu(
    options: dict[str, Any],
) -> None:
    on_cpu = ("vllm", False, installed(is_cpu_build=True), options)
    with pytest.raises(ConfigError, match="leave it or --seed out"):
        choose_engine(*on_cpu, seeded=True)
    assert choose_engine(*on_cpu)[0] == "vllm"
    assert choose_engine("vllm", True, installed(), options, seeded=True)[0] == "vllm"


def test_only_options_that_answers_depend_on_belong_to_a_runs_identity(tmp_path: Path) -> None:
    options = {"quantization": "fp8", "max_num_seqs": 8, "gpu_memory_utilization": 0.5}
    assert answers_depend_on(options) == {"quantization": "fp8"}
    config = RunConfig(contexts_file=tmp_path, output_file=tmp_path / "o", model_path="m")
    assert options_part(config) == {}  # runs of before there were options stay the same runs
    assert options_part(config.replace(engine_options=options)) == {
        "engine_options": {"quantization": "fp8"}
    }
    with pytest.raises(ConfigError, match="are for --engine vllm"):
        config.replace(engine="transformers", engine_options=options)


# ---- what it is started with


def spec(model_dir: Path, **changes: Any) -> EngineSpec:
    return EngineSpec(
        model_dir=model_dir,
        sampling=SamplingParams(max_new_tokens=8),
        prompts=PromptSettings(system_prompt=""),
        **changes,
    )


def model(folder: Path, weights_gib: int, heads: int = 32, kv_heads: int = 8) -> Path:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 18944}))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights_gib * GIB)  # a hole: takes no space
    return folder


@pytest.mark.parametrize(
    ("weights_gib", "heads", "num_gpus", "size", "note"),
    [
        (16, 32, 8, 1, "more workers are faster than more GPUs"),
        (16, 32, 1, 1, None),
        (140, 32, 4, 4, None),
        (140, 32, 8, 4, "the others stay untouched"),
        (140, 28, 3, 2, "heads don't split 3 ways"),  # the most that it can be split
    ],
)
def test_the_fewest_gpus_that_hold_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights_gib: int,
    heads: int,
    num_gpus: int,
    size: int,
    note: str | None,
) -> None:
    monkeypatch.setattr(vllm_settings, "discover_gpus", lambda: fake_inventory(num_gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = model(tmp_path, weights_gib, heads, kv_heads=4)
    arguments, notes = vllm_settings.engine_arguments(
        spec(folder, num_gpus=num_gpus), needs_tokenizer=False
    )
    assert arguments["tensor_parallel_size"] == size
    assert (note or "") in " ".join(notes)
    assert bool(notes) == (note is not None)


def test_options_of_the_user_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "discover_gpus", lambda: fake_inventory(4))
    options = {"tensor_parallel_size": 4, "max_num_seqs": 7}
    given = spec(model(tmp_path, 1), num_gpus=4, engine_options=options, batch_size=5)
    arguments, notes = vllm_settings.engine_arguments(given, needs_tokenizer=True)
    assert (arguments["tensor_parallel_size"], arguments["max_num_seqs"]) == (4, 7)
    assert notes == []


SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.5, top_p=0.9)


@pytest.mark.parametrize("draws_here", [False, True])
def test_greedy_and_unseeded_requests_are_sampled_by_vllm(draws_here: bool) -> None:
    greedy = SamplingParams(max_new_tokens=8)
    sampled = vllm_settings.request_sampling(greedy, None, draws_here=draws_here)
    assert sampled == {"temperature": 0.0, "top_p": 1.0}
    sampled = vllm_settings.request_sampling(SAMPLING, None, draws_here=draws_here)
    assert sampled == {"temperature": 0.5, "top_p": 0.9}


def test_seeds_are_vllms_or_of_the_logits_processor() -> None:
    large = 2**64 - 1
    assert vllm_settings.request_sampling(SAMPLING, large, draws_here=False) == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 2**63 - 1,
    }
    drawn = vllm_settings.request_sampling(SAMPLING, large, draws_here=True)
    asked = {"seed": large, "sampling": {"temperature": 0.5, "top_p": 0.9}}
    assert drawn == {"temperature": 0.0, "extra_args": {vllm_settings.DRAW: asked}}


@pytest.mark.parametrize(
    ("num_gpus", "temperature", "expected"), [(0, 0.5, True), (0, 0.0, False), (1, 0.5, False)]
)
def test_draws_are_made_here_on_the_cpu_only_and_never_when_greedy(
    tmp_path: Path, num_gpus: int, temperature: float, expected: bool
) -> None:
    given = spec(tmp_path, num_gpus=num_gpus)
    sampling = SamplingParams(max_new_tokens=8, temperature=temperature)
    assert vllm_settings.samples_on_cpu(dataclasses.replace(given, sampling=sampling)) == expected


@pytest.mark.parametrize("given", [None, ["theirs:Processor"]])
def test_draws_come_after_the_users_logits_processors(given: list[str] | None) -> None:
    config = SimpleNamespace(
        speculative_config=None, model_config=SimpleNamespace(logits_processors=given)
    )
    assert vllm_settings.draw_here(config)
    ours = "ragfleet.engines.vllm_draws:SeededDraws"
    assert config.model_config.logits_processors == [*(given or []), ours]


@pytest.mark.parametrize(
    "other", [{"use_v2_model_runner": True}, {"speculative_config": {"method": "ngram"}}]
)
def test_draws_stay_vllms_where_it_takes_no_such_processor(other: dict[str, Any]) -> None:
    model_config = SimpleNamespace(logits_processors=None)
    config = SimpleNamespace(**{"speculative_config": None, "model_config": model_config, **other})
    assert not vllm_settings.draw_here(config)
    assert model_config.logits_processors is None


def test_a_gpu_that_workers_share_gets_a_fixed_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_settings, "discover_gpus", lambda: fake_inventory(1))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = spec(model(tmp_path, 10), num_gpus=1, gpu_memory_bytes=40 * GIB)
    arguments, _ = vllm_settings.engine_arguments(given, needs_tokenizer=False)
    assert 25 * GIB < arguments["kv_cache_memory_bytes"] < 30 * GIB
    assert arguments["gpu_memory_utilization"] == 0.45
    whole = spec(tmp_path, num_gpus=1)
    assert (
        "kv_cache_memory_bytes"
        not in vllm_settings.engine_arguments(whole, needs_tokenizer=False)[0]
    )


def test_without_nvml_as_many_gpus_as_heads_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_settings, "discover_gpus", lambda: GpuInventory(reason="no driver"))
    given = spec(model(tmp_path, 1), num_gpus=8)
    arguments, _ = vllm_settings.engine_arguments(given, needs_tokenizer=False)
    assert arguments["tensor_parallel_size"] == 8

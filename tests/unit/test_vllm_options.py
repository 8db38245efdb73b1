"""What is told about vLLM without importing it: versions, option names, the choice of `auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ragfleet import RunConfig
from ragfleet.engines.vllm_options import (
    InstalledVllm,
    answers_depend_on,
    check_options,
    choose_engine,
    find_vllm,
    option_names,
)
from ragfleet.errors import ConfigError, DeviceError
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

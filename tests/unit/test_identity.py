"""What makes a run another run, and what a start may change."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ragfleet.config import RunConfig
from ragfleet.errors import ModelError, OutputError
from ragfleet.identity import (
    Identity,
    RunFile,
    check_same_run,
    check_truncation,
    model_parts,
    read_run_file,
    write_run_file,
)
from ragfleet.launch import RunPaths
from ragfleet.preparation import prepare

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048, "eos_token_id": 2}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def safetensors(tensors: Mapping[str, bytes], metadata: str = "pt") -> bytes:
    """The format by hand: the header's length, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": metadata}}
    place = 0
    for name, data in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(data)],
            "data_offsets": [place, place + len(data)],
        }
        place += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


WEIGHTS = {"embed": bytes(range(256)) * 8, "layer.0": b"\x01" * 2000, "scale": b"\x07"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "model.safetensors").write_bytes(safetensors(WEIGHTS))
    return folder


def run_key(model: Path | None = None, **settings: Any) -> str:
    """Key of a start with these settings, prepared as the command line does."""
    folder = settings.pop("folder", None) or (model.parent if model else Path())
    config = RunConfig(
        **{
            "contexts_file": folder / "contexts.jsonl",
            "output_file": folder / "out.jsonl",
            "model_path": str(model) if model else None,
            "device": "cpu",
        }
        | settings
    )
    return prepare(config, {}).identity.run_key.hex()


# ---- what changes a run


def test_a_run_is_what_it_is(model: Path) -> None:
    assert run_key(model) == run_key(model)
    assert len(bytes.fromhex(run_key(model))) == 16


def test_a_model_that_moved_is_the_same_model(model: Path) -> None:
    before = run_key(model)
    moved = model.parent / "elsewhere" / "renamed"
    shutil.copytree(model, moved, copy_function=shutil.copyfile)
    (moved / "README.md").write_text("new")
    (moved / "training_args.bin").write_bytes(b"x")
    assert run_key(moved) == before
    link = model.parent / "link"
    link.symlink_to(moved)
    assert run_key(link) == before


@pytest.mark.parametrize("tensor", list(WEIGHTS))
def test_other_weights_of_the_same_shapes_are_another_model(model: Path, tensor: str) -> None:
    before = model_parts(model)
    data = bytearray(WEIGHTS[tensor])
    data[len(data) // 2] ^= 1
    (model / "model.safetensors").write_bytes(safetensors({**WEIGHTS, tensor: bytes(data)}))
    after = model_parts(model)
    assert after["model weights"] != before["model weights"]
    assert {name for name in before if before[name] != after[name]} == {"model weights"}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", json.dumps({**CONFIG, "rope_theta": 5e5}), "model config"),
        ("tokenizer.json", '{"version": "1.1"}', "tokenizer"),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE + " "}), "tokenizer"),
        ("chat_template.jinja", TEMPLATE, "tokenizer"),
        ("generation_config.json", '{"eos_token_id": [2, 3]}', "end tokens"),
        ("model.safetensors", safetensors({"x": b"x"}), "model weights"),
    ],
)
def test_each_file_that_answers_depend_on_counts(
    model: Path, name: str, content: str | bytes, part: str
) -> None:
    before, key = model_parts(model), run_key(model)
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    after = model_parts(model)
    assert {found for found in before if before[found] != after[found]} == {part}
    assert run_key(model) != key


def test_only_the_files_that_are_loaded_count(model: Path) -> None:
    before = run_key(model)
    (model / "consolidated.safetensors").write_bytes(safetensors({"x": b"x"}))  # for others
    assert run_key(model) == before
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-1.safetensors").write_bytes(safetensors({"x": b"x"}))
    keys = {before}
    for data in (b"y", b"z"):
        (model / "model-2.safetensors").write_bytes(safetensors({"y": data}))
        keys.add(run_key(model))
    assert len(keys) == 3


def test_of_the_generation_config_only_the_end_tokens_count(model: Path) -> None:
    before = run_key(model)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    assert run_key(model) == before


def test_text_can_not_move_from_one_tokenizer_file_to_the_next(model: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (model / name).write_bytes(b"ab")
    before = model_parts(model)["tokenizer"]
    (model / "vocab.json").write_bytes(b"abab")
    (model / "merges.txt").write_bytes(b"")
    assert model_parts(model)["tokenizer"] != before


def test_many_tensors_are_sampled_evenly(model: Path) -> None:
    """Beyond 1,024 tensors a changed fine-tune is still seen, for it changes them all."""
    names = [f"t{number:05d}" for number in range(3000)]
    (model / "model.safetensors").write_bytes(safetensors(dict.fromkeys(names, b"aaaa")))
    before = model_parts(model)["model weights"]
    (model / "model.safetensors").write_bytes(safetensors(dict.fromkeys(names, b"bbbb")))
    assert model_parts(model)["model weights"] != before


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 511},
        {"temperature": 0.3},
        {"temperature": 0},
        {"top_p": 0.9},
        {"seed": 1},
        {"stop": ("x",)},
        {"stop": ("x", "y")},
        {"system_prompt": "be brief"},
        {"system_prompt": ""},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_what_answers_depend_on_is_another_run(model: Path, settings: dict[str, Any]) -> None:
    assert run_key(model, **settings) != run_key(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 3},
        {"num_workers": 2},
        {"max_samples_per_worker": 5},
        {"schedule": "static"},
        {"dedup": "off"},
        {"failed_contexts": "drop"},
        {"include_context": True},
        {"max_retries": 7},
        {"request_timeout_s": 5},
        {"max_restarts": 0},
        {"retry_failed": True},
        {"verbose": True},
        {"fail_on_errors": True},
        {"truncate_context": "head"},
        {"max_model_len": 1024},
        {"gpu_pick": "all"},
        {"precision": "fp32"},  # what auto is on a CPU
        {"contexts_file": Path("/elsewhere.jsonl")},
        {"trust_remote_code": True},
    ],
    ids=str,
)
def test_how_a_run_is_carried_out_is_no_other_run(model: Path, settings: dict[str, Any]) -> None:
    assert run_key(model, **settings) == run_key(model)


def test_sampling_settings_do_not_count_when_greedy(model: Path) -> None:
    greedy = run_key(model, temperature=0)
    assert run_key(model, temperature=0.0, top_p=0.5, seed=3) == greedy


def test_the_prompt_template_counts_by_its_text(model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "a.jinja", tmp_path / "b.jinja"
    one.write_text("{{ query }} {{ context }}")
    other.write_text("{{ query }} {{ context }}")
    assert run_key(model, prompt_template=one) == run_key(model, prompt_template=other)
    assert run_key(model, prompt_template=one) != run_key(model)
    other.write_text("{{ query }} {{ context }}", encoding="utf-8-sig")  # as some editors do
    assert run_key(model, prompt_template=one) == run_key(model, prompt_template=other)
    other.write_text("{{ query }}: {{ context }}")
    assert run_key(model, prompt_template=one) != run_key(model, prompt_template=other)


def test_the_clock_counts_only_where_the_chat_template_prints_it(model: Path) -> None:
    def starts(template: str) -> list[str]:
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        keys = []
        for clock in ("2026-01-01T10:00:00", "2026-01-02T10:00:00"):
            paths = RunPaths(model.parent / "out.jsonl")
            write_run_file(paths, RunFile(run_key="", parts={}, clock=clock))
            keys.append(run_key(model))
        shutil.rmtree(paths.directory)
        return keys

    first, second = starts(TEMPLATE)
    assert first == second
    first, second = starts("Today is {{ strftime_now('%d %b') }}." + TEMPLATE)
    assert first != second


def test_a_class_counts_by_name_and_version_and_not_by_its_folder(tmp_path: Path) -> None:
    source = (
        "from ragfleet import QueryBasedInference\n\n\n"
        "class Mine(QueryBasedInference):\n"
        "{version}"
        "    def generate_answer(self, query, context, retrieval_method):\n"
        "        return {answer!r}\n"
    )

    def key_of(folder: str, version: str = "", answer: str = "a", name: str = "Mine") -> str:
        file = tmp_path / folder / "my.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source.format(version=version, answer=answer).replace("Mine", name))
        return run_key(inference_class=f"{file}:{name}", folder=tmp_path)

    first = key_of("one")
    assert key_of("two") == first
    assert key_of("one", answer="b") == first, "an edit is only noted"
    assert key_of("one", version="    version = '2'\n") != first
    assert key_of("one", name="Other") != first
    assert run_key(engine="echo", folder=tmp_path) != first


# ---- folders that are no models


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        model_parts(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        struct.pack("<Q", 12) + b'{"a":{"b":1}',
        struct.pack("<Q", 9) + b'{"a": []}',
        struct.pack("<Q", 31) + b'{"a": {"data_offsets": [1, []]}}',
    ],
    ids=["empty", "short", "long header", "array", "no JSON", "cut", "no entry", "wrong offsets"],
)
def test_a_broken_weights_file_is_named(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors .*download it again"):
        model_parts(model)


# ---- starts of one run


def test_the_difference_to_an_earlier_run_is_shown(tmp_path: Path) -> None:
    before = {"temperature": 0.2, "stop": [], "system prompt": "长" * 100, "tokenizer": "aa"}
    after = {"temperature": 0.7, "stop": [], "system prompt": None, "model config": "bb"}
    found = RunFile(run_key=Identity(before).run_key.hex(), parts=before, clock="")
    output = tmp_path / "answers.jsonl"
    check_same_run(found, Identity(before), output, 5)
    with pytest.raises(OutputError) as caught:
        check_same_run(found, Identity(after), output, 12345)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{output} belongs to a run with other settings:"
    assert lines[1:-1] == [
        '  model config         first start none, now "bb"',
        '  system prompt        first start "' + "长" * 27 + " … " + "长" * 27 + '", now none',
        "  temperature          first start 0.2, now 0.7",
        '  tokenizer            first start "aa", now none',
    ]
    assert "--overwrite (it moves 12,345 finished answers to answers.bak-<time>)" in lines[-1]


def test_equal_settings_are_one_run_whatever_order_they_stand_in(tmp_path: Path) -> None:
    one = Identity({"a": 1, "b": [1, {"x": None}]})
    assert Identity({"b": [1, {"x": None}], "a": 1}).run_key == one.run_key
    assert Identity({"a": 1, "b": [1, {}]}).run_key != one.run_key
    assert Identity({"a": "1", "b": [1, {"x": None}]}).run_key != one.run_key


def test_every_other_run_shows_a_difference(model: Path) -> None:
    """What is written to run.json and read back still tells the parts apart."""
    paths = RunPaths(model.parent / "out.jsonl")
    config = RunConfig(
        contexts_file=Path("c"), output_file=paths.output_file, model_path=str(model), device="cpu"
    )
    identity = prepare(config, {}).identity
    run_file = RunFile(
        run_key=identity.run_key.hex(), parts=dict(identity.parts), clock="2026-01-01T00:00:00"
    )
    write_run_file(paths, run_file)
    found = read_run_file(paths)
    assert found == run_file
    for settings in ({"temperature": 1}, {"stop": ["x"]}, {"chat_template_kwargs": {"a": 1}}):
        other = prepare(config.replace(**settings), {}).identity
        with pytest.raises(OutputError, match="first start"):
            check_same_run(found, other, paths.output_file, 0)
    check_same_run(found, prepare(config, {}).identity, paths.output_file, 0)


def test_flags_of_another_engine_are_said_to_be_unused(model: Path) -> None:
    config = RunConfig(
        contexts_file=Path("c"),
        output_file=model.parent / "out.jsonl",
        model_path=str(model),
        device="cpu",
        prefix_sharing="on",
        kv_cache_bytes=10**9,
    )
    line = (
        "--prefix_sharing and --kv_cache_bytes: not used, for the engine is echo, not transformers."
    )
    assert line in prepare(config.replace(engine="echo"), {}).notes
    assert not [note for note in prepare(config, {}).notes if "not used" in note]


def test_no_run_file_is_a_first_start_and_a_broken_one_an_error(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    assert read_run_file(paths) is None
    paths.directory.mkdir()
    for broken in (b"", b"{", b"[]", b'{"run_key": 5}'):
        paths.identity.write_bytes(broken)
        with pytest.raises(OutputError, match=r"run\.json can't be read"):
            read_run_file(paths)
    write_run_file(paths, RunFile(run_key="00", parts={}, clock="", format=99))
    with pytest.raises(OutputError, match="another version"):
        read_run_file(paths)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ([], ["head", 100], False),
        (["error", None], ["head", 100], False),
        (["head", 100], ["head", 100], False),
        (["head", 100], ["tail", 100], True),
        (["head", 100], ["head", 200], True),
        (["head", 100], ["error", 100], True),
    ],
)
def test_rows_cut_one_way_are_not_mixed_with_rows_cut_another(
    before: list[Any], now: list[Any], refused: bool
) -> None:
    found = RunFile(run_key="", parts={}, clock="", truncation=before)
    if refused:
        with pytest.raises(OutputError, match="--truncate_context head"):
            check_truncation(found, now, Path("o.jsonl"))
    else:
        check_truncation(found, now, Path("o.jsonl"))

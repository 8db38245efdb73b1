"""Which files a model's weights are in, and what they take once loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from ragfleet import hub
from ragfleet.errors import ModelError
from ragfleet.model_files import check_tokenizer, check_weights, weight_files, weights_bytes


def write_weights(path: Path, dtype: str, num_bytes: int) -> None:
    """A safetensors file of one tensor; the bytes behind the header are a hole."""
    header = {"__metadata__": {}, "w": {"dtype": dtype, "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + num_bytes)


def sharded(folder: Path) -> Path:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        write_weights(folder / name, "BF16", 100)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def names_of(folder: Path) -> list[str]:
    return [path.name for path in weight_files(folder)]


def test_a_second_layout_counts_once(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    write_weights(folder / "consolidated.safetensors", "BF16", 200)
    assert len(names_of(folder)) == 2
    assert weights_bytes(folder, 2) == 200
    check_weights(folder)


def test_the_single_file_and_then_whatever_there_is(tmp_path: Path) -> None:
    write_weights(tmp_path / "consolidated.safetensors", "BF16", 200)
    assert names_of(tmp_path) == ["consolidated.safetensors"]
    write_weights(tmp_path / "model.safetensors", "BF16", 100)
    assert names_of(tmp_path) == ["model.safetensors"]


def test_plain_tensors_are_loaded_in_the_runs_precision(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", "F32", 400)
    assert (weights_bytes(tmp_path, 2), weights_bytes(tmp_path, 4)) == (200, 400)
    write_weights(tmp_path / "model.safetensors", "BF16", 400)
    assert weights_bytes(tmp_path, 4) == 800
    write_weights(tmp_path / "model.safetensors", "I32", 400)
    assert weights_bytes(tmp_path, 4) == 400, "packed"


def test_a_shard_that_the_index_names_and_nobody_brought(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_weights(folder)


@pytest.mark.parametrize("has_shards", [True, False])
def test_a_second_layout_is_downloaded_only_where_it_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_shards: bool
) -> None:
    asked: list[Any] = []

    def snapshot_download(model_id: str, **patterns: Any) -> str:
        asked.append(patterns.get("ignore_patterns"))
        if has_shards:
            sharded(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.download("org/name", False) == tmp_path
    assert asked == [["consolidated*.safetensors"], *([] if has_shards else [None])]


def test_weights_that_are_not_whole_are_told_by_their_header(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    last = folder / "model-00002-of-00002.safetensors"
    check_weights(folder)
    whole = last.stat().st_size
    for size in (whole - 1, whole - 100, 60, 20, 8, 7, 0):
        os.truncate(last, size)
        with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors is .*download it again"):
            check_weights(folder)
    for tensor in ({}, [], {"data_offsets": 1}, {"data_offsets": ["a", "b"]}):
        text = json.dumps({"w": tensor}).encode()
        last.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ModelError, match="is not a safetensors file; download it again"):
            check_weights(folder)


@pytest.mark.parametrize(
    ("files", "config", "is_there"),
    [
        (["tokenizer.json"], {}, True),
        (["vocab.json", "merges.txt"], {}, True),
        (["tokenizer.model"], {}, True),
        (["qwen.tiktoken"], {}, True),
        ([], {"tokenizer_class": "ByT5Tokenizer"}, True),
        ([], {"auto_map": {"AutoTokenizer": ["t.T", None]}}, True),
        ([], {"tokenizer_class": "ByteTokenizer"}, True),
        (["special_tokens_map.json", "merges.txt"], {"tokenizer_class": "GPT2Tokenizer"}, False),
    ],
)
def test_a_folder_without_a_tokenizer(
    tmp_path: Path, files: list[str], config: dict[str, Any], is_there: bool
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in files:
        (tmp_path / name).touch()
    if is_there:
        check_tokenizer(tmp_path)
        return
    with pytest.raises(ModelError, match="there is no tokenizer here"):
        check_tokenizer(tmp_path)

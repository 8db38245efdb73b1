"""What a model's folder says about itself, without loading it.

Owns the reading of config.json, generation_config.json, the tokenizer's side files, and which
files the weights are in and how large they get. Knows nothing of tokenizers or prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragfleet.errors import ConfigError, ModelError

SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
CONVERT = (
    'python -c "import sys, transformers as t; a, b = sys.argv[1:];'
    " t.AutoModelForCausalLM.from_pretrained(a, dtype='auto').save_pretrained(b);"
    ' t.AutoTokenizer.from_pretrained(a).save_pretrained(b)" {folder} {folder}-safetensors'
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PLAIN_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_POINTER = b"version https://git-lfs"
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.vocab", "*.tiktoken", "tekken.json")
_CONTEXT_LIMIT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "n_ctx",
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} where there is no such file. Raises ModelError for a broken one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again.")
    return value


def check_weights(model_dir: Path) -> None:
    """Raises ModelError unless the folder holds a config and all of its weights, whole."""
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir}/config.json is missing: this is not a model folder.")
    files = weight_files(model_dir)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, but the index names it; finish the download.")
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ModelError(f"{file} is a git-lfs pointer; run `git lfs pull` in the folder.")
        _check_whole(file)
    if files:
        return
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise ModelError(
            f"{model_dir}: only pickled weights (.bin, .pt) are here, and loading those can run"
            f" code; if you trust them, convert once:\n{CONVERT.format(folder=model_dir)}"
        )
    raise ModelError(f"{model_dir}: there is no *.safetensors file here; finish the download.")


def check_tokenizer(model_dir: Path) -> None:
    """Raises ModelError where a tokenizer's vocabulary is in none of the files that may hold it."""
    if any(next(model_dir.glob(pattern), None) is not None for pattern in _VOCABULARIES):
        return
    config = read_json(model_dir / "tokenizer_config.json")
    # A class of its own may need no file: the model's code has it, or it reads bytes.
    if "auto_map" not in config and not re.search("Byte|ByT5", str(config.get("tokenizer_class"))):
        raise ModelError(
            f"{model_dir}: there is no tokenizer here (tokenizer.json, or tokenizer.model, or"
            " vocab.json with merges.txt); finish the download, or download it again."
        )


def _check_whole(file: Path) -> None:
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
        needed = begin
        if begin <= size:
            ends = [tensor["data_offsets"][1] for tensor in _header(file).values()]
            needed += max(ends, default=0)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file; download it again.") from None
    if needed > size:
        raise ModelError(
            f"{file} is cut short or not safetensors; download it again. It has {size:,} bytes of"
            f" {needed:,}."
        )


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold a model's weights: those its index names, else the single one, else all.

    Some folders hold them twice, in the layout of another library (consolidated.safetensors).
    """
    names = set(read_json(model_dir / _INDEX).get("weight_map", {}).values())
    if names:
        return [model_dir / name for name in sorted(names)]
    single = model_dir / _SINGLE
    return [single] if single.is_file() else sorted(model_dir.glob("*.safetensors"))


def weights_bytes(model_dir: Path, dtype_bytes: int) -> int:
    """Memory of the weights once loaded: plain tensors with `dtype_bytes` for each number, packed
    ones (of quantised models) as they are.

    Reads the headers of the files. Raises ModelError for a broken one.
    """
    total = 0
    for path in weight_files(model_dir):
        for tensor in _header(path).values():
            first, end = tensor.get("data_offsets", (0, 0))
            stored = end - first
            kind = tensor.get("dtype", "")
            if kind in _PLAIN_DTYPES:
                stored = stored // _PLAIN_DTYPES[kind] * dtype_bytes
            total += stored
    return total


def has_output_layer(model_dir: Path) -> bool:
    """Whether the weights have one of their own; else it is the embeddings, as config.json need not
    say. Raises ModelError for a broken file."""
    return any("lm_head.weight" in name for p in weight_files(model_dir) for name in _header(p))


def _header(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 1 << 28)))
        header.pop("__metadata__", None)
        return dict(header)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a safetensors file ({error}); download it again."
        ) from None


def context_limit(model_dir: Path) -> int | None:
    """Most tokens of prompt plus answer by config.json; None where it does not say.

    YaRN, linear and dynamic RoPE scaling multiply the trained length, as vLLM reads them.
    """
    config = read_json(model_dir / "config.json")
    text = config.get("text_config") or {}
    limits = [
        value
        for key in _CONTEXT_LIMIT_KEYS
        if isinstance(value := config.get(key, text.get(key)), int) and value > 0
    ]
    if not limits:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind in ("yarn", "linear", "dynamic") and rope.get("factor"):
        trained = rope.get("original_max_position_embeddings") or min(limits)
        return int(trained * rope["factor"])
    return min(limits)


def model_limit(model_dir: Path, max_model_len: int | None) -> int | None:
    """Most tokens of prompt plus answer. Raises ModelError where --max_model_len is above it."""
    limit = context_limit(model_dir)
    if max_model_len is None:
        return limit
    if limit is not None and max_model_len > limit:
        raise ModelError(
            f"--max_model_len {max_model_len} is above the {limit} that"
            f" {model_dir}/config.json allows."
        )
    return max_model_len


def check_room(model_dir: Path, max_model_len: int | None, max_new_tokens: int) -> None:
    """Raises ConfigError where the answer leaves no room: every row would be `too_long`."""
    limit = model_limit(model_dir, max_model_len)
    if limit is not None and max_new_tokens >= limit:
        raise ConfigError(
            f"--max_new_tokens {max_new_tokens:,} leaves no room for a prompt: the model takes"
            f" {limit:,} tokens of prompt and answer together."
        )


def special_tokens(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens by `tokenizer_config.json` (`config`) and its older companion."""
    named = dict(config)
    if "added_tokens_decoder" not in config:  # the older layout, whose map file wins
        named.update(read_json(model_dir / "special_tokens_map.json"))
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        value = named.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def chat_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """The default template: its own file, the tokenizer's config, or the processor's file."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if found is None:
        found = read_json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # named templates
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, Mapping):
        found = found.get("default")
    return found if isinstance(found, str) else None


def configured_eos_ids(model_dir: Path) -> set[int]:
    """The ids of generation_config.json that end an answer, else those of config.json."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(model_dir / name)
        text_config = config.get("text_config") or {}
        value = config.get("eos_token_id", text_config.get("eos_token_id"))
        if value is not None:
            return set(value) if isinstance(value, list) else {value}
    return set()

"""What a run's answers depend on, and whether a start may go on with an earlier one's.

Owns `run_key` and `run.json`. In: texts of prompts, sampling, precision, the model's bytes, the
user's class, and the clock where the chat template prints it. Not in: where files are, workers,
launchers, devices and batch sizes, for a run is resumed on another machine, with other workers,
from another mount.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from ragfleet.errors import ModelError, OutputError
from ragfleet.launch import RunPaths, to_json, write_atomically
from ragfleet.model_files import configured_eos_ids, weight_files
from ragfleet.shards import is_own_name

FORMAT: Final = 1
_WEIGHT_SAMPLES: Final = 1024
_SAMPLE_BYTES: Final = 256
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)


class Selection(msgspec.Struct, kw_only=True, frozen=True):
    """Which rows an output has, and how their keys are made."""

    contexts_file: str
    key_fields: list[str] | None
    covers_id: bool
    """Keys cover the record's id: sampling."""
    distinct: bool
    """Equal keys are answered one by one."""
    num_workers: int
    max_samples_per_worker: int | None
    include_context: bool
    drop_failed_contexts: bool
    launch_id: str = ""


class RunFile(msgspec.Struct, kw_only=True):
    """run.json: the identity of a run and what its starts have to know of each other."""

    format: int = FORMAT
    run_key: str
    parts: dict[str, Any]
    clock: str
    """Time of the first start, handed to chat templates ever after."""
    output_name: str = ""
    starts: int = 0
    truncation: list[Any] = []
    """[truncate_context, max_model_len] of the last start."""
    class_hash: str | None = None
    selection: Selection | None = None
    """What the last start was about, for `merge` and `status`."""
    merged: dict[str, Any] | None = None
    """Counts of the last complete merge, and the selection it was of."""
    written: list[str] = []
    """Hashes of the outputs that merges made last: one that has another was edited since."""
    answer_tokens: float | None = None
    """Mean length of the answers of the last start that made enough of them."""


@dataclass(frozen=True)
class Identity:
    """`parts` by name, for showing a difference; `run_key` is their hash, 16 bytes."""

    parts: Mapping[str, Any]

    @property
    def run_key(self) -> bytes:
        text = json.dumps(self.parts, sort_keys=True, ensure_ascii=False)
        return xxhash.xxh3_128_digest(text.encode())


def model_parts(model_dir: Path) -> dict[str, Any]:
    """Fingerprint of a model folder: config, tokenizer, the weights' headers, sizes and samples.

    Headers and sizes are equal for all checkpoints of one fine-tune, so up to 1,024 tensors, evenly
    chosen, also give 256 bytes from their middle. It never reads a path or a time.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        raise ModelError(f"{model_dir} has no config.json; --model_path must be a model folder.")
    return {
        "model config": _hash_files([config]),
        "tokenizer": _hash_files([model_dir / name for name in _TOKENIZER_FILES]),
        "end tokens": sorted(configured_eos_ids(model_dir)),
        "model weights": _hash_weights(weight_files(model_dir)),
    }


def _hash_files(paths: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        if path.is_file():
            data = path.read_bytes()
            digest.update(f"{path.name}:{len(data)}:".encode())
            digest.update(data)
    return digest.hexdigest()


def _hash_weights(paths: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    tensors: list[tuple[Path, int, int]] = []
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ModelError(f"{path} is cut short or not safetensors; download it again.")
            header = file.read(length)
        digest.update(f"{path.name}:{size}:".encode())
        digest.update(header)
        try:
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = map(int, entry["data_offsets"])
                    tensors.append((path, 8 + length + (begin + end) // 2, end - begin))
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ModelError(f"{path} is not a safetensors file; download it again.") from None
    step = max(1, -(-len(tensors) // _WEIGHT_SAMPLES))
    fds: dict[Path, int] = {}
    try:
        for path, middle, num_bytes in tensors[::step]:
            if path not in fds:
                fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            digest.update(os.pread(fds[path], min(_SAMPLE_BYTES, num_bytes), middle))
    finally:
        for fd in fds.values():
            os.close(fd)
    return digest.hexdigest()


def read_run_file(paths: RunPaths) -> RunFile | None:
    """None where there is none. A broken one is an error: guessing would mix runs."""
    try:
        data = paths.identity.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = msgspec.json.decode(data, type=RunFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OutputError(
            f"{paths.identity} can't be read ({error}). Remove it to go on with the answers whose"
            " keys still match, or take --overwrite to start afresh."
        ) from None
    if found.format != FORMAT:
        raise OutputError(f"{paths.identity} was written by another version of ragfleet.")
    return found


def write_run_file(paths: RunPaths, run_file: RunFile) -> None:
    paths.directory.mkdir(parents=True, exist_ok=True)
    write_atomically(paths.identity, to_json(msgspec.to_builtins(run_file)))


def clashing_run(output_file: Path) -> Path | None:
    """The folder of another run beside this one where either's output has a name of the other's own
    files: as `lora_rank8.jsonl` beside `lora.jsonl`, whose worker 8 would write into it."""

    def clash(other: Path) -> bool:
        return is_own_name(output_file, other) or is_own_name(other, output_file)

    own = output_file.stem
    for directory in sorted(output_file.absolute().parent.glob("*.run")):
        other = directory.with_suffix(".jsonl")
        # Asked first, for folders may hold thousands of runs.
        if not (other.stem.startswith(own) or own.startswith(other.stem)) or not clash(other):
            continue
        # A broken one: whose it is can't be told.
        with contextlib.suppress(OutputError, OSError, ValueError):
            found = read_run_file(RunPaths(other))
            if found is not None and clash(other.with_name(found.output_name or other.name)):
                return directory
    return None


def now() -> str:
    """Local time to the second, ISO 8601."""
    return datetime.datetime.now().replace(microsecond=0).isoformat()


def check_same_run(
    found: RunFile, identity: Identity, output_file: Path, num_finished: int
) -> None:
    """Raises OutputError that shows each difference when the run is another one."""
    if found.run_key == identity.run_key.hex():
        return
    lines = [f"{output_file} belongs to a run with other settings:"]
    for name in sorted({*found.parts, *identity.parts}):
        before, after = found.parts.get(name), identity.parts.get(name)
        if before != after:
            lines.append(f"  {name:<20} first start {_short(before)}, now {_short(after)}")
    lines.append(
        f"Take another --output_file, or --overwrite (it moves {num_finished:,} finished answers"
        f" to {output_file.stem}.bak-<time>)."
    )
    raise OutputError("\n".join(lines))


def check_truncation(found: RunFile, now_: list[Any], output_file: Path) -> None:
    """Rows that were cut one way can't be mixed with rows cut another way."""
    before = found.truncation
    if before and before[0] != "error" and before != now_:
        raise OutputError(
            f"{output_file}: the first start cut contexts with --truncate_context {before[0]}"
            f" --max_model_len {before[1]}, this one asks for {now_[0]} and {now_[1]}. Keep the"
            " first, or take another --output_file or --overwrite."
        )


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:28] + " … " + text[-28:]

"""One launch of a run, as files: what its workers read, written once by whoever planned it.

    results.run/
      run.json                identity of the run: what its answers depend on
      lock                    held by the process that plans and merges
      logs/                   one log per worker
      launches/<launch_id>/   this start alone; may be deleted when nothing runs
        records.npy order.npy leads.npy chunks.npy
        launch.json           written last: its presence says that the plan is complete
        claims/ beats/ journals/

Owns these paths and formats. Knows nothing of how workers are started or what they do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ragfleet.claims import Board, ClaimStore
from ragfleet.config import PrefixSharing
from ragfleet.engines.protocol import EngineSpec, PromptSettings, SamplingParams
from ragfleet.errors import OutputError, StorageError
from ragfleet.remote.spec import RemoteSpec
from ragfleet.shards import fsync_directory

FORMAT: Final = 2
WORK_ARRAYS: Final = ("records", "order", "leads", "chunks")


class SeatSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker may use; `environment` goes over that of whoever starts it."""

    environment: dict[str, str]
    num_gpus: int
    num_threads: int
    gpu_memory_bytes: int | None = None
    """Part of each GPU, where workers share them."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs beside the arrays. Times in seconds."""

    format: int = FORMAT
    launch_id: str
    contexts_file: str
    output_file: str
    run_key: str
    engine: str
    inference_class: str | None
    model_dir: str | None
    inference_type: str
    remote: RemoteSpec | None
    sampling: dict[str, Any]
    prompts: dict[str, Any]
    precision: str
    batch_size: int | None
    engine_options: dict[str, Any]
    prefix_sharing: PrefixSharing
    kv_cache_bytes: int | None
    max_model_len: int | None
    trust_remote_code: bool
    max_retries: int
    request_timeout_s: float | None
    start_timeout_s: float
    stall_timeout_s: float
    fsync_s: float
    seed: int | None
    include_context: bool
    num_workers: int
    num_started: int
    """Workers that are started: no more than there are chunks."""
    verbose: bool
    private: bool = False
    may_steal: bool
    beat_timeout_s: float
    seats: list[SeatSpec]

    def engine_spec(
        self, num_gpus: int, num_threads: int, rank: int = 0, shared_dir: Path | None = None
    ) -> EngineSpec:
        return EngineSpec(
            model_dir=Path(self.model_dir) if self.model_dir is not None else None,
            sampling=SamplingParams(**{**self.sampling, "stop": tuple(self.sampling["stop"])}),
            prompts=PromptSettings(**self.prompts),
            precision=self.precision,  # type: ignore[arg-type]
            num_gpus=num_gpus,
            num_threads=num_threads,
            batch_size=self.batch_size,
            engine_options=self.engine_options,
            gpu_memory_bytes=self.seats[rank].gpu_memory_bytes,
            prefix_sharing=self.prefix_sharing,
            kv_cache_bytes=self.kv_cache_bytes,
            max_model_len=self.max_model_len,
            trust_remote_code=self.trust_remote_code,
            max_retries=self.max_retries,
            request_timeout_s=self.request_timeout_s,
            inference_type=self.inference_type,
            remote=self.remote,
            rank=rank,
            num_workers=self.num_workers,
            shared_dir=shared_dir,
            run_dir=RunPaths(Path(self.output_file)).directory,
        )


@dataclass(frozen=True)
class RunPaths:
    """Where a run keeps its files, all beside the output file."""

    output_file: Path

    @property
    def directory(self) -> Path:
        return self.output_file.with_name(f"{self.output_file.stem}.run")

    @property
    def identity(self) -> Path:
        return self.directory / "run.json"

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def launches(self) -> Path:
        return self.directory / "launches"

    def launch(self, launch_id: str) -> LaunchPaths:
        return LaunchPaths(self.launches / launch_id)


@dataclass(frozen=True)
class LaunchPaths:
    directory: Path

    @property
    def spec(self) -> Path:
        return self.directory / "launch.json"

    @property
    def nothing_to_do(self) -> Path:
        """Written instead of `spec` when all is answered, for ranks that wait for a plan."""
        return self.directory / "nothing_to_do"

    @property
    def claims(self) -> Path:
        return self.directory / "claims"

    @property
    def beats(self) -> Path:
        return self.directory / "beats"

    @property
    def journals(self) -> Path:
        return self.directory / "journals"

    def array(self, name: str) -> Path:
        return self.directory / f"{name}.npy"


@dataclass(frozen=True)
class Work:
    """The arrays of a launch, memory-mapped for workers.

    Attributes:
        records: [num_records] of index.RECORD.
        order: [num_requests] u4, rows of `records` that are to do.
        leads: [num_requests] bool, where in `order` a prefix group begins.
        chunks: [num_chunks] of plan.CHUNK.
    """

    records: NDArray[Any]
    order: NDArray[Any]
    leads: NDArray[Any]
    chunks: NDArray[Any]

    def board(self, num_workers: int) -> Board:
        slices: list[list[int]] = [[] for _ in range(num_workers)]
        for number, chunk in enumerate(self.chunks["slice"].tolist()):
            slices[chunk].append(number)
        return Board(slices=slices, costs=self.chunks["cost"].tolist())


def write_launch(
    paths: LaunchPaths, launch: Launch, work: Work, deaths: Mapping[str, Sequence[int]]
) -> None:
    """Write the plan of a launch, and the deaths of earlier ones; `launch.json` appears last and
    whole."""
    try:
        for directory in (paths.claims, paths.beats, paths.journals):
            directory.mkdir(parents=True, exist_ok=True)
        for name in WORK_ARRAYS:
            np.save(paths.array(name), getattr(work, name))
    except OSError as error:  # numpy's own "324 requested and 250 written" has no strerror
        reason = error.strerror or "no space left on the device"
        raise StorageError(f"Can't write {paths.directory}: {reason}.") from error
    for owner, rows in deaths.items():
        ClaimStore(paths.claims).record_death(owner, rows)
    write_atomically(paths.spec, msgspec.json.format(msgspec.json.encode(launch)))


def read_launch(paths: LaunchPaths) -> Launch:
    launch = msgspec.json.decode(paths.spec.read_bytes(), type=Launch)
    if launch.format != FORMAT:
        raise OutputError(f"{paths.spec} was written by another version of ragfleet.")
    return launch


def read_work(paths: LaunchPaths) -> Work:
    arrays = {
        name: np.load(paths.array(name), mmap_mode="r", allow_pickle=False) for name in WORK_ARRAYS
    }
    return Work(**arrays)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, whole or not at all, also across a power loss.

    Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"Can't write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def to_json(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"

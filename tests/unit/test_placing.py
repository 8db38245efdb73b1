"""A start on GPUs that aren't there: beside other runs, on older ones, on MIG instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_model_weights import write_weights

from ragfleet import gpu_locks, preparation, runner, seating
from ragfleet.config import RunConfig
from ragfleet.engines.vllm_options import InstalledVllm
from ragfleet.errors import DeviceError, UsageError
from ragfleet.gpu_locks import GpuLocks
from ragfleet.identity import RunFile, write_run_file
from ragfleet.inventory import GIB, GpuInventory, fake_inventory
from ragfleet.launch import RunPaths
from ragfleet.preparation import Preparation, prepare
from ragfleet.prompt_view import rendered_prompt

CONFIG = (
    '{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,'
    ' "torch_dtype": "bfloat16"}'
)
CLOCK = "2026-01-02T03:04:05"
Start = Callable[..., Preparation]


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_locks, "DIRECTORY", tmp_path / "locks")
    monkeypatch.setattr(gpu_locks, "_WAIT_S", 0.05)
    monkeypatch.setattr(preparation, "find_vllm", lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "contexts.jsonl").write_text('{"id": "a", "query": "How?", "context": "So."}\n')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(CONFIG)
    write_weights(model / "model.safetensors", "BF16", 15 * GIB)
    (model / "tokenizer.json").touch()
    return RunConfig(
        contexts_file=tmp_path / "contexts.jsonl",
        output_file=tmp_path / "out.jsonl",
        model_path=str(model),
    )


@pytest.fixture
def start(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Start:
    def prepared(
        machine: GpuInventory, locks: GpuLocks | None = None, **settings: Any
    ) -> Preparation:
        monkeypatch.setattr(preparation, "discover_gpus", lambda: machine)
        return prepare(config.replace(**settings), {}, gpu_locks=locks)

    return prepared


def with_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = InstalledVllm(version="0.32.0", folder=tmp_path, is_cpu_build=False)
    monkeypatch.setattr(preparation, "find_vllm", lambda: installed)


def indices(found: Preparation) -> list[list[int]]:
    return [[gpu.index for gpu in worker.gpus] for worker in found.allocation.workers]


# ---- beside other runs


def test_two_starts_at_once_choose_different_gpus(start: Start) -> None:
    machine = fake_inventory(4)
    with GpuLocks() as second:
        with GpuLocks() as first:
            assert indices(start(machine, first, num_workers=2, gpus_per_worker=1)) == [[0], [1]]
            other = start(machine, second, num_workers=2, gpus_per_worker=1)
            assert indices(other) == [[2], [3]]
            assert sum("held by another ragfleet run, pid" in note for note in other.notes) == 2
            with pytest.raises(DeviceError, match="held by another ragfleet run, pid"):
                start(machine, GpuLocks(), num_workers=2)
            with pytest.raises(DeviceError, match="held by another ragfleet run"):
                start(machine, GpuLocks(), num_workers="auto")
            # Who takes GPUs as they are takes these too.
            assert len(indices(start(machine, GpuLocks(), gpu_pick="all"))[0]) == 4
        assert indices(start(machine, num_workers=2, gpus_per_worker=1)) == [[0], [1]]


def test_a_plan_looks_and_takes_nothing(start: Start, tmp_path: Path) -> None:
    machine = fake_inventory(2)
    assert indices(start(machine, num_workers=2)) == [[0], [1]]
    assert not (tmp_path / "locks").exists()
    with GpuLocks() as locks:
        start(machine, locks, num_workers=1, gpus_per_worker=1)
        assert indices(start(machine)) == [[1]]


def test_who_is_overtaken_between_look_and_lock_looks_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fake_inventory(3)
    with GpuLocks() as first, GpuLocks() as second:
        start(machine, first, num_workers=1, gpus_per_worker=1)
        monkeypatch.setattr(GpuLocks, "holders", lambda *_: {})
        assert indices(start(machine, second, num_workers=1, gpus_per_worker=2)) == [[1, 2]]


def test_without_a_place_for_locks_the_header_says_so(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_locks, "DIRECTORY", tmp_path / "no" / "locks")
    found = start(fake_inventory(1), GpuLocks())
    assert [note for note in found.notes if note.startswith("GPUs are not locked")]


def test_a_run_keeps_its_gpus_and_the_cpu_needs_none(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, gpu_locks: GpuLocks) -> Any:
        gpu_locks.take(["GPU-a"])
        assert set(GpuLocks().holders(["GPU-a"])) == {"GPU-a"}
        raise UsageError("enough")

    monkeypatch.setattr(runner, "prepare", stopped)
    with pytest.raises(UsageError, match="enough"):
        runner.run(config)
    assert GpuLocks().take(["GPU-a"]) == {}
    monkeypatch.undo()
    monkeypatch.setattr(gpu_locks, "DIRECTORY", tmp_path / "none")
    with GpuLocks() as locks:
        prepare(config.replace(device="cpu", engine="echo", model_path=None), {}, gpu_locks=locks)
    assert not (tmp_path / "none").exists()


def test_a_prompt_is_shown_whoever_has_the_gpus(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = fake_inventory(2, busy={0: "pid 7", 1: "pid 7"})
    monkeypatch.setattr(preparation, "discover_gpus", lambda: busy)
    monkeypatch.setattr(seating, "available_memory_bytes", lambda: 1)
    monkeypatch.setattr(seating, "whole_memory_bytes", lambda: 1)
    settings: dict[str, Any]
    for settings in ({}, {"device": "cpu"}, {"total_gpus": 2}, {"num_workers": "auto"}):
        asked = config.replace(model_path="pocket", **settings)
        assert "How?" in rendered_prompt(asked, "a")[0]


# ---- precision


def older(machine: GpuInventory) -> GpuInventory:
    first, *others = machine.gpus
    first = replace(first, name="Tesla V100-SXM2-32GB", compute_capability=(7, 0))
    newer = [replace(gpu, compute_capability=(9, 0)) for gpu in others]
    return replace(machine, gpus=(first, *newer))


def test_older_gpus_compute_bf16_checkpoints_in_fp16(start: Start) -> None:
    machine = older(fake_inventory(2))
    found = start(machine, num_workers=2)
    assert found.precision == "fp16"
    (note,) = [note for note in found.notes if "bf16" in note]
    assert note == (
        "GPU 0 (Tesla V100-SXM2-32GB, compute capability 7.0) has no bf16: fp16 is taken. Where"
        " that overflows: --precision fp32."
    )
    assert start(GpuInventory(gpus=machine.gpus[1:])).precision == "bf16"
    assert start(fake_inventory(1)).precision == "bf16", "not known"
    assert start(machine, precision="fp32").precision == "fp32"


def test_bf16_that_was_asked_for_on_older_gpus(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = older(fake_inventory(1))
    found = start(machine, precision="bf16")
    assert found.precision == "bf16"
    assert [note for note in found.notes if note.startswith("Warning: GPU 0 (Tesla V100")]
    with_vllm(monkeypatch, tmp_path)
    assert (start(machine).engine, start(machine).precision) == ("vllm", "fp16")
    with pytest.raises(DeviceError, match=r"--precision bf16: GPU 0.*Use --precision fp16"):
        start(machine, precision="bf16")


def test_a_run_goes_on_in_the_precision_it_was_begun_in(
    start: Start, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever GPUs are free today."""
    old, new = older(fake_inventory(1)), fake_inventory(1)
    paths = RunPaths(config.output_file)
    paths.directory.mkdir()

    def begun_in(precision: str) -> None:
        parts = {"precision": precision}
        run_file = RunFile(run_key="", parts=parts, clock=CLOCK, output_name="out.jsonl")
        write_run_file(paths, run_file)

    begun_in("fp16")
    assert start(new).precision == "fp16"
    assert start(new, precision="bf16").precision == "bf16", "what is asked for is another run"
    assert start(new, overwrite=True).precision == "bf16"
    begun_in("bf16")
    found = start(old)
    assert found.precision == "bf16"
    assert [note for note in found.notes if note.startswith("Warning: GPU 0 (Tesla V100")]
    monkeypatch.setattr(seating, "whole_memory_bytes", lambda: 64 * GIB)
    assert start(GpuInventory(reason="there is none."), device="cpu").precision == "fp32"
    with_vllm(monkeypatch, tmp_path)
    with pytest.raises(DeviceError, match=r"begun in bf16: GPU 0.*--engine transformers"):
        start(old)


# ---- MIG


def test_vllm_is_not_taken_for_mig_instances(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch, tmp_path)
    machine = fake_inventory(2, 160, mig={0: 4})
    found = start(machine, num_workers=2)
    assert found.engine == "transformers"
    assert "Engine: transformers; vLLM can't use MIG instances." in found.notes
    with pytest.raises(DeviceError, match=r"can't use MIG.*--engine transformers"):
        start(machine, num_workers=2, engine="vllm")
    assert start(machine, num_workers=2, engine="transformers").engine == "transformers"
    # The instances are left out, and what remains is a whole GPU.
    busy = [replace(gpu, free_bytes=0) if gpu.is_mig else gpu for gpu in machine.gpus]
    assert start(GpuInventory(gpus=tuple(busy))).engine == "vllm"
    assert start(fake_inventory(2), num_workers=2).engine == "vllm"

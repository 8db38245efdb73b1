"""How many workers with how many GPUs each: realistic models on machines that aren't there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragfleet import seating, seats
from ragfleet.allocation import Allocation, threads_of
from ragfleet.config import RunConfig
from ragfleet.errors import DeviceError, ModelError
from ragfleet.inventory import GIB, GpuInventory, fake_inventory
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.layout import (
    Demand,
    ModelSize,
    choose_gpus,
    cpu_workers,
    divides,
    faster_layout,
    layout_of,
    layouts,
)
from ragfleet.preparation import Preparation
from ragfleet.seating import Seating, read_model_size, seat, typical_prompt_tokens


def size(
    billions: float, layers: int, hidden: int, heads: int, kv: int, mlp: int, vocab: int
) -> ModelSize:
    return ModelSize(
        weights_bytes=int(billions * 2e9),
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        vocab_size=vocab,
    )


QWEN_7B = size(7.62, 28, 3584, 28, 4, 18944, 152_064)
LLAMA_8B = size(8.03, 32, 4096, 32, 8, 14336, 128_256)
LLAMA_70B = size(70.55, 80, 8192, 64, 8, 28672, 128_256)
LLAMA_405B = size(405.9, 126, 16384, 128, 8, 53248, 128_256)
DEMAND = Demand(num_requests=64, prompt_tokens=2000, answer_tokens=512)


# ---- which splits there are


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (QWEN_7B, [1, 2, 4]),  # 28 heads don't split 8 ways; 4 key/value heads not 7 ways
        (LLAMA_8B, [1, 2, 4, 8]),
        (LLAMA_70B, [1, 2, 4, 8]),
    ],
)
def test_heads_decide_how_a_model_splits(model: ModelSize, sizes: list[int]) -> None:
    assert [num for num in range(1, 9) if divides(model, num)] == sizes


def test_the_cache_of_a_token_is_what_the_shapes_say() -> None:
    assert QWEN_7B.kv_bytes_per_token() == 2 * 28 * 4 * 128 * 2 == 57_344
    assert LLAMA_8B.kv_bytes_per_token() == 131_072
    assert LLAMA_70B.kv_bytes_per_token(4) == 2 * 80 * 2 * 128 * 2
    assert LLAMA_70B.kv_bytes_per_token(16) == 2 * 80 * 1 * 128 * 2, "replicated, not split"
    assert LLAMA_70B.kv_bytes_per_token(3, "layers") == 2 * 27 * 8 * 128 * 2


# ---- which one is taken


@pytest.mark.parametrize(
    ("model", "num_gpus", "gib_each", "expected"),
    [
        (QWEN_7B, 8, 80, "8×1"),
        (QWEN_7B, 8, 40, "8×1"),
        (QWEN_7B, 8, 16, "4×2"),  # 14.2 GiB of weights leave no room on 14.4 usable
        (QWEN_7B, 4, 11, "1×4"),
        (LLAMA_8B, 3, 80, "3×1"),
        (LLAMA_70B, 8, 80, "2×4"),  # two GPUs hold the weights and 1 GiB of cache
        (LLAMA_70B, 8, 40, "1×8"),
        (LLAMA_70B, 8, 192, "8×1"),
        (LLAMA_70B, 7, 80, "1×4"),  # 5, 6, 7 don't divide the heads
    ],
)
def test_the_fastest_split_that_fits(
    model: ModelSize, num_gpus: int, gib_each: int, expected: str
) -> None:
    layout, _ = choose_gpus([gib_each * GIB] * num_gpus, model, DEMAND)
    assert layout.name == expected
    assert layout.num_requests >= 1


def test_the_sum_is_shown_and_right() -> None:
    layout, _ = choose_gpus([80 * GIB] * 8, QWEN_7B, DEMAND)
    assert layout.arithmetic() == (
        "weights 14.2 GiB + activations 1.9 GiB + KV of 64 × 2,512 tokens 8.6 GiB"
        " = 24.6 GiB of 72.0 GiB usable"
    )


def test_nothing_fits_is_refused_with_every_sum() -> None:
    with pytest.raises(DeviceError) as caught:
        choose_gpus([80 * GIB] * 8, LLAMA_405B, DEMAND)
    text = str(caught.value)
    assert "does not fit 8 GPU(s)" in text
    for num_gpus in (1, 2, 4, 8):
        assert f"  {num_gpus} GPU(s) a worker: weights" in text
    assert "8 GPU(s) a worker: weights 94.5 GiB" in text
    assert "3, 5, 6, 7 GPUs a worker: 128 attention heads (8 key/value) don't split so" in text


def test_layers_that_take_turns_are_no_faster_on_more_gpus() -> None:
    one = layout_of([80 * GIB] * 8, QWEN_7B, DEMAND, 8, 1, "layers")
    two = layout_of([80 * GIB] * 8, QWEN_7B, DEMAND, 4, 2, "layers")
    assert two.requests_per_s == pytest.approx(one.requests_per_s / 2)
    assert choose_gpus([40 * GIB] * 7, LLAMA_8B, DEMAND, "layers")[0].name == "7×1"
    assert choose_gpus([12 * GIB] * 7, LLAMA_8B, DEMAND, "layers")[0].num_gpus == 2


@pytest.mark.parametrize(
    ("gib_each", "prompt_tokens", "name"),
    [(22.5, 4000, "2×1"), (22.5, 16_000, "1×2"), (20, 4000, "1×2"), (40, 16_000, "2×1")],
)
def test_layers_are_spread_for_room_alone(gib_each: float, prompt_tokens: int, name: str) -> None:
    """What is spread shares no prefixes, and the speeds here know nothing of that; but a worker
    with two requests at once shares nothing either."""
    demand = Demand(num_requests=64, prompt_tokens=prompt_tokens, answer_tokens=512)
    gpus = [int(gib_each * GIB)] * 2
    assert choose_gpus(gpus, LLAMA_8B, demand, "layers")[0].name == name
    alone = layout_of(gpus, LLAMA_8B, demand, 2, 1, "layers")
    line = faster_layout(alone, layouts(gpus, LLAMA_8B, demand, "layers"))
    assert (line is None) == (name == "2×1")


def test_a_large_batch_that_is_asked_for_does_not_keep_a_model_out() -> None:
    demand = Demand(num_requests=8192, prompt_tokens=2000, answer_tokens=512)
    chosen, _ = choose_gpus([24 * GIB], LLAMA_8B, demand, "layers")
    each = demand.tokens_per_request * chosen.kv_bytes_per_token + chosen.logits_bytes
    room = chosen.usable_bytes - chosen.weights_bytes - chosen.activation_bytes
    assert chosen.num_requests == room // each > 0


def test_another_split_that_is_faster_is_named() -> None:
    gpus = [80 * GIB] * 8
    found = layouts(gpus, QWEN_7B, DEMAND)
    line = faster_layout(layout_of(gpus, QWEN_7B, DEMAND, 4, 2), found)
    assert line is not None
    assert line.startswith("4×2 fits; 8×1 about 1.")
    assert line.endswith(" × faster (--num_workers 8).")
    assert faster_layout(layout_of(gpus, QWEN_7B, DEMAND, 8, 1), found) is None
    small = [16 * GIB] * 8
    line = faster_layout(layout_of(small, QWEN_7B, DEMAND, 8, 1), layouts(small, QWEN_7B, DEMAND))
    assert line is not None
    assert "8×1 does not fit" in line
    assert "4×2 does (--num_workers 4)" in line


@given(
    st.sampled_from([QWEN_7B, LLAMA_8B, LLAMA_70B, LLAMA_405B]),
    st.lists(st.integers(4, 200), min_size=1, max_size=16),
    st.sampled_from(["heads", "layers"]),
    st.integers(1, 300),
)
def test_what_is_chosen_fits_and_nothing_that_fits_is_faster(
    model: ModelSize, gib_each: list[int], split: Any, wanted: int
) -> None:
    demand = Demand(num_requests=wanted, prompt_tokens=1000, answer_tokens=200)
    gpus = [gib * GIB for gib in gib_each]
    larger = [[one for one in gpus if one >= least] for least in set(gpus)]
    firsts = [layouts(some, model, demand, split)[0] for some in larger]
    try:
        chosen, least = choose_gpus(gpus, model, demand, split)
    except DeviceError:
        assert all(layout.num_requests == 0 for layout in firsts)
        return
    assert all(one.requests_per_s <= 1.15 * chosen.requests_per_s for one in firsts)
    gpus = [one for one in gpus if one >= least]
    found = layouts(gpus, model, demand, split)
    assert chosen.num_workers * chosen.num_gpus <= len(gpus)
    assert split == "layers" or divides(model, chosen.num_gpus)
    cache = chosen.num_requests * demand.tokens_per_request * chosen.kv_bytes_per_token
    logits = chosen.num_requests * chosen.logits_bytes
    assert chosen.weights_bytes + chosen.activation_bytes + logits + cache <= 0.9 * min(gpus)
    fitting = [layout for layout in found if layout.num_requests]
    enough = [one.num_gpus for one in fitting if one.num_requests >= min(4, wanted)]
    if split == "layers" and enough:
        assert chosen.num_gpus == min(enough)
    else:
        assert chosen.requests_per_s == max(layout.requests_per_s for layout in fitting)


# ---- the CPU


@pytest.mark.parametrize(
    ("cores", "threads", "available", "weights", "expected"),
    [
        (8, 1, None, None, 8),
        (8, 4, None, None, 2),
        (2, 4, None, None, 1),
        (8, 1, 64 * GIB, 1 * GIB, 8),
        (64, 1, 64 * GIB, 14 * GIB, 3),
    ],
)
def test_workers_on_the_cpu(
    cores: int, threads: int, available: int | None, weights: int | None, expected: int
) -> None:
    workers, why = cpu_workers(cores, threads, available, weights)
    assert workers == expected
    assert f"{cores} cores // {threads} thread(s)" in why


def test_a_model_larger_than_memory_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"weights 30\.0 GiB.* of 16\.0 GiB available"):
        cpu_workers(8, 1, 16 * GIB, 30 * GIB)


def test_a_model_too_large_in_fp32_alone_is_sent_to_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_auto in (True, False):
        num_workers = "auto" if is_auto else 1
        for memory_gib, way in (
            (24, "Use --precision bf16, or take a smaller"),
            (12, r"\. Take a"),
        ):
            cpu_machine(monkeypatch, cores=8, memory_gib=memory_gib)
            asked = seating_of(tmp_path, fake_inventory(0), 14, num_workers=num_workers)
            with pytest.raises(DeviceError, match=way):
                seat(asked)
    cpu_machine(monkeypatch, cores=8, memory_gib=30)
    asked = seating_of(tmp_path, fake_inventory(0), 14, num_workers=2)
    both = "Use --num_workers 1 or fewer or --precision bf16, or take a smaller model"
    with pytest.raises(DeviceError, match=both):
        seat(asked)
    asked = seating_of(tmp_path, fake_inventory(0), 14, num_workers=4)
    with pytest.raises(DeviceError, match="Use --num_workers 1 or fewer, or take a smaller"):
        seat(asked)


# ---- from files


def model_folder(folder: Path, tensors: dict[str, tuple[str, int]], **config: Any) -> Path:
    """A model's config and the headers of its weights; the bytes behind them are a hole."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, (dtype, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [], "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


LLAMA_CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}


def test_a_models_size_is_read_from_its_files(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", 15 * 10**9), "b": ("F32", 2 * 10**9), "packed": ("I32", 7)}
    folder = model_folder(tmp_path / "m", tensors, **LLAMA_CONFIG)
    found = read_model_size(folder, 2)
    assert found is not None
    assert found.weights_bytes == 15 * 10**9 + 10**9 + 7, "fp32 is loaded as bf16, packed as it is"
    assert (found.num_layers, found.head_dim, found.num_key_value_heads) == (32, 128, 8)
    on_cpu = read_model_size(folder, 4)
    assert on_cpu is not None
    assert on_cpu.weights_bytes == 30 * 10**9 + 2 * 10**9 + 7
    nested = model_folder(tmp_path / "n", tensors, text_config=LLAMA_CONFIG)
    assert read_model_size(nested, 2) == found
    assert read_model_size(model_folder(tmp_path / "o", tensors, model_type="odd"), 2) is None
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        read_model_size(folder, 2)


def seating_of(
    tmp_path: Path, inventory: GpuInventory, gib_weights: float = 16, **settings: Any
) -> Seating:
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_text(
        "".join(json.dumps({"query": "q", "context": "x" * 7000}) + "\n" for _ in range(50))
    )
    tensors = {"w": ("BF16", int(gib_weights * GIB))}
    folder = model_folder(tmp_path / "model", tensors, **LLAMA_CONFIG)
    config = RunConfig(
        contexts_file=contexts,
        output_file=tmp_path / "out.jsonl",
        model_path=str(folder),
        **{"num_workers": "auto", **settings},
    )
    return Seating(
        config=config,
        torchrun=None,
        environ={},
        inventory=inventory,
        model_dir=folder,
        splits_heads=True,
    )


def test_auto_takes_all_free_gpus(tmp_path: Path) -> None:
    machine = fake_inventory(8, 80, busy={2: "pid 7 (python), 70 GiB"})
    workers, allocation, notes = seat(seating_of(tmp_path, machine))
    assert workers == 7
    assert [worker.gpus[0].index for worker in allocation.workers] == [0, 1, 3, 4, 5, 6, 7]
    assert notes[0].startswith("auto: 7×1: weights 16.0 GiB + activations")
    assert "64 × 2,581 tokens" in notes[0], "7,034 bytes a line, and the longest answer"


def test_auto_splits_a_model_that_one_gpu_does_not_hold(tmp_path: Path) -> None:
    workers, allocation, notes = seat(seating_of(tmp_path, fake_inventory(8, 16)))
    assert (workers, allocation.gpus_per_worker) == (4, 2)
    assert notes[0].startswith("auto: 4×2: weights 8.0 GiB")


def told(asked: Seating, allocation: Allocation, engine: str = "vllm") -> dict[str, Any]:
    prepared = SimpleNamespace(config=asked.config, allocation=allocation, engine=engine)
    return seats._engine_options(cast(Preparation, prepared))


def test_vllm_is_told_of_the_split_that_auto_has_chosen(tmp_path: Path) -> None:
    """One GPU holds the weights of 15 GiB, so left to itself vLLM leaves the other untouched."""
    machine = fake_inventory(2, 24)
    asked = seating_of(tmp_path, machine, gib_weights=15)
    workers, allocation, notes = seat(asked)
    assert (workers, allocation.gpus_per_worker) == (1, 2)
    assert notes[0].startswith("auto: 1×2: weights 7.5 GiB")
    assert told(asked, allocation) == {"tensor_parallel_size": 2}
    assert told(asked, allocation, "transformers") == {}
    given = seating_of(tmp_path, machine, 15, engine_options={"pipeline_parallel_size": 2})
    assert told(given, allocation) == {"pipeline_parallel_size": 2}
    for settings in ({"num_workers": 1}, {"gpus_per_worker": 2}):
        other = seating_of(tmp_path, machine, gib_weights=15, **settings)
        _, allocation, notes = seat(other)
        assert allocation.gpus_per_worker == 2
        assert told(other, allocation) == {}
        assert "1×1" in notes[0], "the sum is of what vLLM takes then"
    alone = seating_of(tmp_path, fake_inventory(2, 80), gib_weights=15)
    assert told(alone, seat(alone)[1]) == {}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"tensor_parallel_size": 2}, "4×2"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "2×4"),
        ({"pipeline_parallel_size": 3}, "2×3"),
        ({"tensor_parallel_size": 1}, "8×1"),
        ({"max_num_seqs": 8}, "8×1"),
        ({"tensor_parallel_size": "2"}, "8×1"),  # which vLLM refuses
    ],
)
def test_auto_gives_a_worker_the_gpus_that_vllm_is_told_of(
    tmp_path: Path, options: dict[str, Any], taken: str
) -> None:
    asked = seating_of(tmp_path, fake_inventory(8, 80), engine_options=options)
    workers, allocation, notes = seat(asked)
    assert f"{workers}×{allocation.gpus_per_worker}" == taken
    assert notes[0].startswith(f"auto: {taken}: ")
    assert told(asked, allocation) == options


def test_no_other_split_is_praised_to_who_told_vllm_of_one(tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2}
    machine = fake_inventory(8, 80)
    assert seat(seating_of(tmp_path, machine, num_workers=4, engine_options=options))[2] == []
    assert seat(seating_of(tmp_path, machine, num_workers=4))[2] != []


def test_auto_refuses_more_gpus_than_there_are_for_what_vllm_is_told(tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 4}
    few = seating_of(tmp_path, fake_inventory(2, 80), engine_options=options)
    with pytest.raises(DeviceError, match="--engine_options, 4 a worker, is more than the 2"):
        seat(few)


def test_gpus_that_heads_do_not_split_over_are_no_reason_to_refuse(tmp_path: Path) -> None:
    asked = seating_of(tmp_path, fake_inventory(8, 80), gib_weights=100, gpus_per_worker=3)
    workers, allocation, notes = seat(asked)
    assert (workers, allocation.gpus_per_worker) == (2, 3)
    assert notes[0].startswith("auto: 2×2: weights 50.0 GiB"), "32 heads: two of the three"


def test_a_small_gpu_does_not_hold_the_others_back(tmp_path: Path) -> None:
    machine = fake_inventory(5, 80)
    gpus = [*machine.gpus]
    gpus[1] = dataclasses.replace(gpus[1], total_bytes=24 * GIB, free_bytes=24 * GIB)
    mixed = dataclasses.replace(machine, gpus=tuple(gpus))
    # Five shares of 24 GiB hold no model of 131, four of 80 do.
    workers, allocation, notes = seat(seating_of(tmp_path, mixed, gib_weights=131))
    assert (workers, allocation.gpus_per_worker) == (1, 4)
    assert [gpu.index for gpu in allocation.gpus] == [0, 2, 3, 4]
    assert "of 72.0 GiB usable. GPU 1 left out: the others hold more." in notes[0]
    # A little less is no reason.
    gpus[1] = dataclasses.replace(gpus[1], total_bytes=80 * GIB, free_bytes=79 * GIB)
    alike = dataclasses.replace(machine, gpus=tuple(gpus))
    workers, allocation, notes = seat(seating_of(tmp_path, alike, gib_weights=15))
    assert workers == len(allocation.gpus) == 5
    assert "left out" not in notes[0]
    asked = seating_of(tmp_path, mixed, gib_weights=15, gpus_per_worker=5)
    assert len(seat(asked)[1].gpus) == 5
    with pytest.raises(DeviceError, match=r"does not fit 5 GPU\(s\)"):
        seat(seating_of(tmp_path, mixed, gib_weights=400))


def test_auto_keeps_to_gpus_per_worker_and_total(tmp_path: Path) -> None:
    asked = seating_of(tmp_path, fake_inventory(8, 80), gpus_per_worker=2, total_gpus=6)
    workers, allocation, _ = seat(asked)
    assert (workers, allocation.gpus_per_worker) == (3, 2)
    with pytest.raises(DeviceError, match="--gpus_per_worker 4 is more than the 2 usable"):
        seat(seating_of(tmp_path, fake_inventory(2, 80), gpus_per_worker=4))


def test_auto_is_refused_where_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"does not fit 2 GPU\(s\)"):
        seat(seating_of(tmp_path, fake_inventory(2, 24), gib_weights=140))


def test_numbers_that_are_not_the_best_are_taken_and_remarked(tmp_path: Path) -> None:
    workers, allocation, notes = seat(seating_of(tmp_path, fake_inventory(8, 80), num_workers=2))
    assert (workers, allocation.gpus_per_worker) == (2, 4)
    assert notes == ["2×1 fits; 8×1 about 4.0 × faster (--num_workers 8)."]
    # Two GPUs hold 131 GiB and little else, so vLLM takes all four.
    assert seat(seating_of(tmp_path, fake_inventory(4, 80), 131, num_workers=1))[2] == []
    # And never two for 15 GiB, whatever they would be worth: only auto tells it to.
    assert seat(seating_of(tmp_path, fake_inventory(2, 24), 15, num_workers=2))[2] == []
    assert seat(seating_of(tmp_path, fake_inventory(8, 80), num_workers=8))[2] == []


def test_auto_under_torchrun_is_its_world_size(tmp_path: Path) -> None:
    rank = TorchrunRank.__new__(TorchrunRank)
    object.__setattr__(rank, "world_size", 4)
    asked = dataclasses.replace(seating_of(tmp_path, fake_inventory(8, 80)), torchrun=rank)
    assert seat(asked)[0] == 4


def cpu_machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cores: int,
    memory_gib: int,
    available_gib: int | None = None,
) -> None:
    available = (memory_gib if available_gib is None else available_gib) * GIB
    monkeypatch.setattr(seating, "usable_cores", lambda: cores)
    monkeypatch.setattr(seating.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(seating, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(seating, "whole_memory_bytes", lambda: memory_gib * GIB)


def test_auto_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_machine(monkeypatch, cores=8, memory_gib=110)
    none = fake_inventory(0)
    assert seat(seating_of(tmp_path, none, gib_weights=0.1))[0] == 8
    workers, allocation, notes = seat(seating_of(tmp_path, none, gib_weights=10))
    assert workers == len(allocation.workers) == 3, "20 GiB each as fp32, 33 for keys and values"
    assert [worker.num_threads for worker in allocation.workers] == [3, 3, 2]
    # 3 × (1.1 × 20 + 0.75) GiB, 0.3 of 110, and an output layer of 2 GiB for each.
    assert "memory holds 3: 107.1 GiB together, of 110.0 GiB available" in notes[0]
    threaded = seating_of(tmp_path, none, gib_weights=0.1)
    threaded = dataclasses.replace(threaded, environ={"OMP_NUM_THREADS": "4"})
    assert seat(threaded)[0] == 2
    echo = dataclasses.replace(threaded, environ={}, model_dir=None, needs_no_gpu=True)
    assert seat(echo)[0] == 8
    assert seat(dataclasses.replace(echo, is_remote=True))[0] == 1


@pytest.mark.parametrize(
    ("settings", "tensors", "each"),
    [
        # 28 layers, 2 × 2 heads of 128 in fp32: 57,344 bytes a token; 64 × (64 + 512 + 1024).
        ({}, ["lm_head.weight"], 64 * 1600 * 57_344),
        ({}, ["model.embed_tokens.weight"], 64 * 1600 * 57_344 + 151_936 * 1536 * 4),
        ({"kv_cache_bytes": 10**9}, ["lm_head.weight"], 10**9),
        ({"prefix_sharing": "off"}, [], 0),
        ({"engine": "vllm"}, [], 0),
        ({"inference_class": "mine.py:Mine"}, [], 0),
    ],
)
def test_what_the_loop_takes_of_the_cpus_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    tensors: list[str],
    each: int,
) -> None:
    cpu_machine(monkeypatch, cores=4, memory_gib=400)
    asked = seating_of(tmp_path, fake_inventory(0), **settings)
    qwen = {
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    }
    folder = model_folder(tmp_path / "model", dict.fromkeys(tensors, ("BF16", 2)), **qwen)
    assert seating._loop_memory(asked, folder).of_worker(1) == each
    cpu_machine(monkeypatch, cores=4, memory_gib=16)
    memory = seating._loop_memory(asked, folder)
    if memory.useful_bytes and memory.asked_bytes is None:
        assert memory.of_worker(1) == int(0.3 * 16 * GIB / 4) + memory.packed_bytes
        assert memory.of_worker(2) == int(0.3 * 16 * GIB / 2) + memory.packed_bytes


@pytest.mark.parametrize(
    ("cores", "memory", "available", "gib_weights"),
    [(8, 100, 80, 10), (64, 256, 200, 10), (32, 512, 480, 10), (8, 64, 62, 3), (2, 16, 15, 1)],
)
def test_auto_on_the_cpu_leaves_room_for_what_its_workers_take(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    memory: int,
    available: int,
    gib_weights: int,
) -> None:
    cpu_machine(monkeypatch, cores=cores, memory_gib=memory, available_gib=available)
    asked = seating_of(tmp_path, fake_inventory(0), gib_weights=gib_weights)
    workers, allocation, _ = seat(asked)
    assert asked.model_dir is not None
    taken = seating._loop_memory(asked, asked.model_dir)
    each = [
        2.2 * gib_weights * GIB + 0.75 * GIB + taken.of_worker(worker.num_threads)
        for worker in allocation.workers
    ]
    assert len(each) == workers
    assert sum(each) <= available * GIB
    assert sum(worker.num_threads for worker in allocation.workers) == cores, "none is idle"
    threads = threads_of(workers + 1, cores)
    more = [2.2 * gib_weights * GIB + 0.75 * GIB + taken.of_worker(number) for number in threads]
    assert workers == cores or sum(more) > available * GIB


def test_a_model_that_fits_is_not_refused_for_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_machine(monkeypatch, cores=1, memory_gib=16, available_gib=12)
    workers, _, notes = seat(seating_of(tmp_path, fake_inventory(0), gib_weights=4))
    assert workers == 1
    assert "--kv_cache_bytes limits that" in notes[0]
    asked = seating_of(tmp_path, fake_inventory(0), gib_weights=4, kv_cache_bytes=8 * GIB)
    with pytest.raises(DeviceError, match=r"--kv_cache_bytes do not fit .* 19\.5 GiB together"):
        seat(asked)


def test_prompts_are_sized_by_the_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("x" * 349 + "\n")
    assert typical_prompt_tokens(path) == 160
    assert typical_prompt_tokens(tmp_path / "none") == 512


def test_a_single_worker_on_many_cores_hears_of_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_machine(monkeypatch, cores=8, memory_gib=64)
    none = fake_inventory(0)
    _, _, notes = seat(seating_of(tmp_path, none, gib_weights=0.1, num_workers=None))
    assert [note for note in notes if "--num_workers auto would start 8" in note]
    for settings in ({"num_workers": 1}, {"num_workers": 2}):
        asked = seating_of(tmp_path, none, gib_weights=0.1, **settings)
        assert not [note for note in seat(asked)[2] if "would start" in note]
    echo = seating_of(tmp_path, none, gib_weights=0.1, num_workers=None)
    _, _, notes = seat(dataclasses.replace(echo, needs_no_gpu=True))
    assert not [note for note in notes if "would start" in note]
    large = seating_of(tmp_path, none, gib_weights=100, num_workers=None)
    with pytest.raises(DeviceError, match=r"1 worker\(s\) × weights 200\.0 GiB"):
        seat(large)


def test_models_that_can_not_be_in_memory_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seating, "whole_memory_bytes", lambda: 100 * GIB)
    none = fake_inventory(0)
    asked = seating_of(tmp_path, none, gib_weights=16, num_workers=4)
    with pytest.raises(DeviceError, match=r"4 worker\(s\) × weights 32\.0 GiB = 128\.0 GiB"):
        seat(asked)
    with pytest.raises(DeviceError, match="--num_workers 3 or fewer"):
        seat(asked)
    rank = TorchrunRank.__new__(TorchrunRank)
    object.__setattr__(rank, "world_size", 4)
    started = dataclasses.replace(asked, config=asked.config.replace(num_workers="auto"))
    with pytest.raises(DeviceError, match=r"4 worker\(s\) × weights 32\.0 GiB = 128\.0 GiB"):
        seat(dataclasses.replace(started, torchrun=rank))
    # What others have of it now may be back by the time, and a finished run needs none.
    monkeypatch.setattr(seating, "available_memory_bytes", lambda: 1)
    # In bf16 they fit, and nobody knows what a class of the user's loads.
    assert seat(dataclasses.replace(asked, cpu_precision="bf16"))[0] == 4
    assert seat(dataclasses.replace(asked, needs_no_gpu=True))[0] == 4
    own = dataclasses.replace(asked, config=asked.config.replace(inference_class="a.py:A"))
    assert seat(own)[0] == 4


@pytest.mark.parametrize("settings", [{"total_gpus": 8}, {"gpus_per_worker": 2}])
def test_a_large_model_is_not_answered_on_the_cpu_by_who_asked_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(seating, "whole_memory_bytes", lambda: 1000 * GIB)
    hidden = GpuInventory(reason="CUDA_VISIBLE_DEVICES='' hides all 8 GPUs.")
    asked = seating_of(tmp_path, hidden, num_workers=2, **settings)
    ((name, value),) = settings.items()
    with pytest.raises(DeviceError) as caught:
        seat(asked)
    message = str(caught.value)
    assert message.startswith(f"--{name} {value}: no GPU can be used here: CUDA_VISIBLE_DEVICES=''")
    assert "a model of 32.0 GiB (fp32)" in message
    assert f"with --device cpu and without --{name}." in message
    if name == "gpus_per_worker":  # it says nothing where no GPU is wanted
        assert seat(seating_of(tmp_path, hidden, num_workers=2, total_gpus=0, **settings))[0] == 2
    # Small models are answered there, and the header says so.
    _, allocation, _ = seat(seating_of(tmp_path, hidden, 0.1, num_workers=2, **settings))
    assert allocation.gpus_per_worker == 0
    assert allocation.notes[0].startswith("Running on CPU")
    assert seat(dataclasses.replace(asked, needs_no_gpu=True))[0] == 2
    assert seat(seating_of(tmp_path, hidden, num_workers=2))[0] == 2


def test_need_is_counted_in_the_precision_of_the_run(tmp_path: Path) -> None:
    # 16 GiB as bf16: two workers on a GPU of 40, one as fp32.
    asked = seating_of(tmp_path, fake_inventory(1, 40), num_workers=2)
    assert seat(asked)[0] == 2
    with pytest.raises(DeviceError, match=r"the model needs 35\.1 GiB.*--num_workers 1 or fewer"):
        seat(dataclasses.replace(asked, gpu_precision="fp32"))


def test_a_faster_split_under_torchrun_is_torchruns_number(tmp_path: Path) -> None:
    rank = TorchrunRank.__new__(TorchrunRank)
    object.__setattr__(rank, "world_size", 4)
    asked = seating_of(tmp_path, fake_inventory(8, 80), num_workers=None)
    workers, allocation, notes = seat(dataclasses.replace(asked, torchrun=rank))
    assert (workers, allocation.gpus_per_worker) == (4, 2)
    assert notes == ["4×1 fits; 8×1 about 2.0 × faster (torchrun --nproc_per_node 8)."]


def test_auto_says_which_size_is_not_known(tmp_path: Path) -> None:
    machine = fake_inventory(2)
    unknown = [dataclasses.replace(gpu, total_bytes=0, free_bytes=0) for gpu in machine.gpus]
    workers, _, notes = seat(seating_of(tmp_path, GpuInventory(gpus=tuple(unknown))))
    assert workers == 2
    assert notes == ["auto: 2×1: the GPUs' memory is not known."]
    odd = seating_of(tmp_path, machine)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "odd"}')
    assert seat(odd)[2] == ["auto: 2×1: the model's size is not known."]

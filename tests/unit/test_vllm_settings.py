"""What vLLM is started with, on GPUs that others use too, and how requests are sampled."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragfleet.engines import vllm_memory, vllm_settings
from ragfleet.engines.protocol import EngineSpec, PromptSettings, SamplingParams
from ragfleet.engines.vllm_memory import settled_gpus, shared_cache_bytes, utilisation, worker_gpus
from ragfleet.errors import ConfigError
from ragfleet.inventory import GIB, Gpu, GpuInventory, fake_inventory


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
    size = weights_gib * GIB
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"w": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole: takes no space
    return folder


def gpus_with(*free_gib: float, total_gib: float = 80) -> tuple[Gpu, ...]:
    gpus = fake_inventory(len(free_gib), total_gib).gpus
    return tuple(
        replace(gpu, free_bytes=int(free * GIB)) for gpu, free in zip(gpus, free_gib, strict=True)
    )


def arguments_for(
    given: EngineSpec, gpus: tuple[Gpu, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    return vllm_settings.engine_arguments(given, needs_tokenizer=False, gpus=gpus)


# ---- which of its GPUs


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
    tmp_path: Path, weights_gib: int, heads: int, num_gpus: int, size: int, note: str | None
) -> None:
    folder = model(tmp_path, weights_gib, heads, kv_heads=4)
    arguments, notes = arguments_for(spec(folder, num_gpus=num_gpus), gpus_with(*[80] * num_gpus))
    assert arguments["tensor_parallel_size"] == size
    assert (note or "") in " ".join(notes)
    assert bool(notes) == (note is not None)


def test_room_is_what_is_free(tmp_path: Path) -> None:
    given = spec(model(tmp_path, 50), num_gpus=4)
    assert arguments_for(given, gpus_with(80, 80, 80, 80))[0]["tensor_parallel_size"] == 1
    assert arguments_for(given, gpus_with(60, 80, 80, 80))[0]["tensor_parallel_size"] == 2
    less = replace(given, engine_options={"gpu_memory_utilization": 0.5})
    assert arguments_for(less, gpus_with(80, 80, 80, 80))[0]["tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("options", "size", "part"),
    [({}, 1, 0.9), ({"tensor_parallel_size": 2}, 2, 0.9), ({"tensor_parallel_size": 4}, 4, 0.087)],
)
def test_gpus_that_are_not_used_may_be_full(
    tmp_path: Path, options: dict[str, Any], size: int, part: float
) -> None:
    given = spec(model(tmp_path, 15), num_gpus=4, engine_options=options)
    arguments, _ = arguments_for(given, gpus_with(80, 80, 80, 8))
    assert arguments["tensor_parallel_size"] == size
    assert arguments["gpu_memory_utilization"] == part


@pytest.mark.parametrize(
    ("weights_gib", "num_gpus", "stages", "size"),
    [(140, 4, 2, 2), (140, 8, 2, 2), (280, 8, 2, 4), (16, 4, 2, 1), (16, 4, 4, 1)],
)
def test_stages_share_the_gpus_out(
    tmp_path: Path, weights_gib: int, num_gpus: int, stages: int, size: int
) -> None:
    options = {"pipeline_parallel_size": stages}
    given = spec(model(tmp_path, weights_gib), num_gpus=num_gpus, engine_options=options)
    arguments, notes = arguments_for(given, gpus_with(*[80] * num_gpus))
    assert arguments["tensor_parallel_size"] == size
    assert arguments["pipeline_parallel_size"] == stages
    assert bool(notes) == (stages * size < num_gpus)


@pytest.mark.parametrize("stages", [3, 8, 0, "two"])
def test_stages_must_divide_the_gpus(tmp_path: Path, stages: Any) -> None:
    options = {"pipeline_parallel_size": stages}
    given = spec(model(tmp_path, 16), num_gpus=4, engine_options=options)
    with pytest.raises(ConfigError, match=r"4 GPU\(s\) are not pipeline_parallel_size"):
        arguments_for(given)


def test_options_of_the_user_win(tmp_path: Path) -> None:
    options = {
        "tensor_parallel_size": 4,
        "max_num_seqs": 7,
        "gpu_memory_utilization": 0.5,
        "language_model_only": False,
    }
    given = spec(model(tmp_path, 1), num_gpus=4, engine_options=options, batch_size=5)
    arguments, notes = arguments_for(given, gpus_with(80, 80, 80, 80))
    assert {name: arguments[name] for name in options} == options
    assert notes == []


def test_without_nvml_as_many_gpus_as_heads_allow_and_vllms_own_memory(tmp_path: Path) -> None:
    arguments, _ = arguments_for(spec(model(tmp_path, 1), num_gpus=8))
    assert arguments["tensor_parallel_size"] == 8
    assert "gpu_memory_utilization" not in arguments


def test_what_reads_images_stays_away(tmp_path: Path) -> None:
    """vLLM refuses `skip_tokenizer_init` for it."""
    arguments, _ = arguments_for(spec(model(tmp_path, 1)))
    assert arguments["skip_tokenizer_init"]
    assert arguments["language_model_only"]


# ---- memory


@pytest.mark.parametrize(
    ("free_gib", "most"),
    [(80, 0.9), (79.5, 0.9), (74, 0.9), (72.5, 0.893), (60, 0.737), (20, 0.237), (0.5, 0.01)],
)
def test_vllm_gets_what_is_free(tmp_path: Path, free_gib: float, most: float) -> None:
    given = spec(model(tmp_path, 1), num_gpus=1)
    part = arguments_for(given, gpus_with(free_gib))[0]["gpu_memory_utilization"]
    assert part == most
    # What vLLM checks, when CUDA has taken its context and shows a little less than NVML.
    assert free_gib < 1 or part * 0.99 * 80 <= free_gib - 0.5


def test_the_fullest_gpu_decides() -> None:
    assert utilisation(gpus_with(80, 41, 80), None) == 0.5
    assert utilisation((*gpus_with(80), *gpus_with(23, total_gib=24)), None) == 0.9


@pytest.mark.parametrize(("num_workers", "weights_gib"), [(2, 15), (3, 15), (4, 15), (2, 1)])
def test_a_gpu_that_workers_share(tmp_path: Path, num_workers: int, weights_gib: int) -> None:
    share_gib = 80 / num_workers
    given = spec(model(tmp_path, weights_gib), num_gpus=1, gpu_memory_bytes=int(share_gib * GIB))
    arguments, _ = arguments_for(given, gpus_with(share_gib))  # the others are there already
    cache_gib = arguments["kv_cache_memory_bytes"] / GIB
    assert 0 < cache_gib <= share_gib - weights_gib - 2.5
    assert arguments["gpu_memory_utilization"] * 80 <= min(0.9 * share_gib, share_gib - 1)
    assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (8192, 256)


def test_less_of_a_shared_gpu_where_that_is_asked_for(tmp_path: Path) -> None:
    given = spec(model(tmp_path, 15), num_gpus=1, gpu_memory_bytes=40 * GIB)
    whole = arguments_for(given, gpus_with(40))[0]["kv_cache_memory_bytes"]
    less = replace(given, engine_options={"gpu_memory_utilization": 0.3})
    cache = arguments_for(less, gpus_with(40))[0]["kv_cache_memory_bytes"]
    assert 0 < cache <= 0.3 * 80 * GIB - 15 * GIB
    more = replace(given, engine_options={"gpu_memory_utilization": 0.9})
    assert arguments_for(more, gpus_with(40))[0]["kv_cache_memory_bytes"] == whole
    # Less than the weights: vLLM looks by itself, and says what is missing.
    least = replace(given, engine_options={"gpu_memory_utilization": 0.1})
    assert "kv_cache_memory_bytes" not in arguments_for(least, gpus_with(40))[0]


def test_steps_of_the_users_size_on_a_shared_gpu(tmp_path: Path) -> None:
    given = spec(model(tmp_path, 1), num_gpus=1, gpu_memory_bytes=20 * GIB, batch_size=300)
    assert arguments_for(given)[0]["max_num_seqs"] == 300
    given = replace(given, engine_options={"max_num_batched_tokens": 16384, "max_num_seqs": 512})
    arguments, _ = arguments_for(given)
    assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (16384, 512)
    given = replace(given, engine_options={"enable_chunked_prefill": False})
    assert "max_num_batched_tokens" not in arguments_for(given)[0]


def test_a_gpu_of_ones_own_has_vllms_own_cache_and_steps(tmp_path: Path) -> None:
    arguments, _ = arguments_for(spec(model(tmp_path, 1), num_gpus=1), gpus_with(80))
    assert not arguments.keys() & {"kv_cache_memory_bytes", "max_num_seqs"}
    assert "max_num_batched_tokens" not in arguments


def test_small_shares_have_a_cache_as_long_as_the_weights_fit() -> None:
    assert shared_cache_bytes(3 * GIB, 1 * GIB) == GIB // 2
    assert shared_cache_bytes(GIB, GIB) is None


class Machine:
    """GPUs whose memory comes back as time goes by: {second: free GiB}."""

    def __init__(self, **free_gib: float) -> None:
        self.now_s = 0.0
        self._free_gib = {int(name[1:]): value for name, value in free_gib.items()}

    def look(self) -> tuple[Gpu, ...]:
        return gpus_with([free for s, free in self._free_gib.items() if s <= self.now_s][-1])

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def settle(self, share_gib: float | None = None) -> float:
        share_bytes = None if share_gib is None else int(share_gib * GIB)
        gpus = settled_gpus(share_bytes, self.look, clock=lambda: self.now_s, sleep=self.sleep)
        return gpus[0].free_bytes / GIB


def test_what_a_predecessor_held_is_waited_for() -> None:
    machine = Machine(s0=10, s2=40, s4=79)
    assert machine.settle() == 79
    assert machine.now_s == 4


def test_nobody_waits_for_a_free_gpu() -> None:
    machine = Machine(s0=79)
    assert machine.settle() == 79
    assert machine.now_s == 0


def test_what_somebody_else_holds_is_not_waited_for_long() -> None:
    machine = Machine(s0=50, s10=79)
    assert machine.settle() == 50
    assert machine.now_s == 3


def test_a_share_is_waited_for_with_an_end() -> None:
    machine = Machine(s0=10, s9=40)
    assert machine.settle(40) == 40
    assert machine.now_s == 9
    machine = Machine(s0=10)
    assert machine.settle(40) == 10
    assert machine.now_s == 15


@pytest.mark.parametrize(
    ("inventory", "visible", "num_gpus"),
    [
        (fake_inventory(4), None, 4),
        (fake_inventory(4), fake_inventory(4).gpus[2].uuid, 1),
        (fake_inventory(2, 0), None, 0),  # NVML knows of no memory
        (GpuInventory(reason="no driver"), None, 0),
    ],
)
def test_the_workers_gpus(
    monkeypatch: pytest.MonkeyPatch, inventory: GpuInventory, visible: str | None, num_gpus: int
) -> None:
    monkeypatch.setattr(vllm_memory, "discover_gpus", lambda: inventory)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(worker_gpus()) == num_gpus


# ---- sampling


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

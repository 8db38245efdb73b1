"""How each engine is made for the contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import USER_CLASSES, Make
from fake_server import KEY, MODEL, FakeServer, Settings

from models import NEEDS_VLLM, Reference, make_model
from ragfleet.engines.make import make_engine
from ragfleet.engines.protocol import (
    Engine,
    EngineSpec,
    PromptSettings,
    SamplingParams,
)
from ragfleet.remote.spec import RemoteSpec

CONTRACT_ENGINES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "echo": ("echo", None, {}),
    "transformers": ("transformers", None, {}),
    "plain batches": ("transformers", None, {"prefix_sharing": "off"}),
    "sync": ("echo", "Sync", {}),
    "async": ("echo", "Async", {}),
    "create_prompt": ("transformers", "Prompt", {}),
    "openai_compatible": ("openai_compatible", None, {}),
    "sync around an API": ("openai_compatible", "Sync", {}),
    "vllm": ("vllm", None, {}),
}


@pytest.fixture(scope="session")
def api() -> Iterator[FakeServer]:
    with FakeServer(Settings(latency_s=0.01)) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention on the CPU takes heads of 32 numbers or more."""
    return make_model(tmp_path_factory.mktemp("models") / "vllm", "--head_dim", "32")


@pytest.fixture
def start(
    small_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes started engines and closes them: see `driving.Make`."""
    started: list[Engine] = []

    def make(
        engine: str = "transformers",
        user_class: str | None = None,
        *,
        model_dir: Path | None = None,
        system_prompt: str = "Be brief.",
        truncate_context: Any = "error",
        max_new_tokens: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
        **spec: Any,
    ) -> Engine:
        if engine == "openai_compatible":
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
            spec["remote"] = RemoteSpec(
                provider="openai",
                base_url=request.getfixturevalue("api").base_url,
                model=MODEL,
                key_env="OPENAI_API_KEY",
                max_concurrency=3,
            )
        if engine == "vllm":
            model_dir = model_dir or request.getfixturevalue("vllm_model")
            small = {"kv_cache_memory_bytes": 64 << 20}
            spec["engine_options"] = {**small, **spec.get("engine_options", {})}
        made = make_engine(
            EngineSpec(
                model_dir=model_dir or small_model,
                sampling=SamplingParams(
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop=stop,
                ),
                prompts=PromptSettings(
                    system_prompt=system_prompt, truncate_context=truncate_context
                ),
                **spec,
            ),
            engine,
            None if user_class is None else f"{USER_CLASSES}:{user_class}",
        )
        started.append(made)
        made.start()
        return made

    yield make
    for engine in started:
        engine.close()


@pytest.fixture(
    params=[pytest.param(n, marks=NEEDS_VLLM if n == "vllm" else ()) for n in CONTRACT_ENGINES]
)
def contract_engine(request: pytest.FixtureRequest, start: Make) -> Engine:
    engine, user_class, spec = CONTRACT_ENGINES[request.param]
    return start(engine, user_class, batch_size=3, **spec)


@pytest.fixture(scope="session")
def reference(small_model: Path) -> Reference:
    return Reference(small_model)

"""Engines against a fake server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import KEY, MODEL, Ask, FakeServer, Serve, Settings

from ragfleet.engines.openai_compatible import OpenAICompatibleEngine
from ragfleet.engines.protocol import EngineSpec, PromptSettings, SamplingParams
from ragfleet.remote.spec import RemoteSpec


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[FakeServer] = []

    def make(**settings: Any) -> FakeServer:
        server = FakeServer(Settings(**settings)).__enter__()
        started.append(server)
        return server

    yield make
    for server in started:
        server.__exit__()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Started engines on a server: `connect(server, max_concurrency=4, max_retries=3)`."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started: list[OpenAICompatibleEngine] = []

    def make(
        server: FakeServer,
        *,
        max_retries: int = 8,
        request_timeout_s: float | None = 5.0,
        max_new_tokens: int = 8,
        temperature: float = 0.0,
        stop: tuple[str, ...] = (),
        window_s: float = 60.0,
        **remote: Any,
    ) -> OpenAICompatibleEngine:
        engine = OpenAICompatibleEngine(
            EngineSpec(
                model_dir=None,
                sampling=SamplingParams(
                    max_new_tokens=max_new_tokens, temperature=temperature, stop=stop
                ),
                prompts=PromptSettings(system_prompt="Be brief."),
                max_retries=max_retries,
                request_timeout_s=request_timeout_s,
                remote=RemoteSpec(
                    **{
                        "provider": "openai",
                        "base_url": server.base_url,
                        "model": MODEL,
                        "key_env": "OPENAI_API_KEY",
                        **remote,
                    }
                ),
            ),
            window_s,
        )
        started.append(engine)
        engine.start()
        return engine

    yield make
    for engine in started:
        engine.close()

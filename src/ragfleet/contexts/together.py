"""Embeddings by Together's API, asked as every other remote API is.

Errors, rates, pauses and a dead server mean here what they mean for answers: the client, the gate
and the account are those of `ragfleet.remote`, and all workers of a run keep one account.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ragfleet.errors import ConfigError, RemoteError, RunError
from ragfleet.remote.client import ApiClient
from ragfleet.remote.gate import Gate
from ragfleet.remote.headers import read_rates
from ragfleet.remote.ledger import budget_of
from ragfleet.remote.ledger_file import LedgerFile
from ragfleet.remote.pacing import backoff_s
from ragfleet.remote.replies import Embedded, Fault, read_embeddings
from ragfleet.remote.secret import read_key
from ragfleet.remote.spec import PROVIDERS, RemoteSpec

_MODEL: Final = "BAAI/bge-large-en-v1.5"
_PATH: Final = "/embeddings"
_BATCH: Final = 64
_CONCURRENCY: Final = 8
_RETRIES: Final = 6
_TIMEOUT_S: Final = 60.0
_OUTAGE_S: Final = 600.0
_LOOK_S: Final = 0.5

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def together_spec(model: str | None) -> RemoteSpec:
    """Raises ConfigError when the key is missing or the address is none."""
    provider = PROVIDERS["togetherai"]
    if not os.environ.get(provider.key_env, "").strip():
        raise ConfigError(
            "--embedding_source togetherai needs the key in the environment variable"
            f" {provider.key_env}."
        )
    url = os.environ.get(provider.base_url_env or "", provider.base_url).rstrip("/")
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{provider.base_url_env} must begin with https://, not {url}.")
    return RemoteSpec(
        provider="togetherai",
        base_url=url,
        model=model or _MODEL,
        key_env=provider.key_env,
        max_concurrency=_CONCURRENCY,
        max_outage_s=_OUTAGE_S,
    )


class TogetherEmbedder:
    """The key comes from TOGETHER_API_KEY and appears nowhere."""

    def __init__(self, model: str | None, account: Path | None, num_workers: int) -> None:
        """`account`: the file in which all workers of a run count; None for one alone."""
        self._spec = together_spec(model)
        self._key = read_key(self._spec, os.environ)
        self.name = "together-" + self._spec.model.replace("/", "_")
        self._loop = asyncio.new_event_loop()
        budget = budget_of(self._spec, num_workers, _TIMEOUT_S)
        ledger = LedgerFile(account, budget, num_workers, os.getpid())
        for close in (self._loop.close, ledger.close):
            weakref.finalize(self, close)
        self._gate = Gate(
            ledger.exchange,
            rank=os.getpid(),
            max_concurrency=_CONCURRENCY,
            max_new_tokens=0,
            loop=self._loop,
        )
        self._num_asked = 0
        self._last = ""
        """The last fault, for people."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Raises RemoteError for what ends a run, RunError for texts the API refuses."""
        if not texts:
            return np.zeros((0, 0), np.float32)
        parts = [
            [text or " " for text in texts[start : start + _BATCH]]
            for start in range(0, len(texts), _BATCH)
        ]
        task = self._loop.create_task(self._embed_all(parts))
        try:
            found = self._loop.run_until_complete(task)
        except BaseException:
            if not task.done():  # a signal: nothing may stay behind in the loop
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    self._loop.run_until_complete(task)
            raise
        vectors = np.concatenate([np.asarray(rows, np.float32) for rows in found])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)

    async def _embed_all(self, parts: list[list[str]]) -> list[list[list[float]]]:
        client = ApiClient(self._spec, self._key, _TIMEOUT_S)
        tasks = [asyncio.ensure_future(self._embed(client, part)) for part in parts]
        try:
            while True:
                done, waiting = await asyncio.wait(
                    tasks, timeout=_LOOK_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                if not waiting:
                    return [task.result() for task in tasks]
                if self._gate.error is not None:  # then nothing passes any more
                    raise RemoteError(
                        f"{self._spec.base_url}{_PATH} answers no more: {self._last}. What is"
                        " retrieved is kept: run the same command again."
                    )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._gate.flush()
            self._gate.close()
            await client.close()

    async def _embed(self, client: ApiClient, texts: list[str]) -> list[list[float]]:
        body = {"model": self._spec.model, "input": texts}
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        self._num_asked += 1
        order, attempt = self._num_asked, 1
        while True:
            ticket = await self._gate.enter(order, num_bytes)
            verdict = None
            try:
                verdict, headers = await client.ask(body, _PATH, read_embeddings)
            finally:
                self._gate.leave(ticket, verdict)
            if headers:
                period_s = PROVIDERS[self._spec.provider].limit_period_s
                self._gate.learn_rates(read_rates(headers, period_s))
            if isinstance(verdict, Embedded):
                if len(verdict.vectors) == len(texts):
                    return verdict.vectors
                raise RunError(
                    f"{self._spec.base_url}{_PATH} gave {len(verdict.vectors)} vectors for"
                    f" {len(texts)} texts."
                )
            assert isinstance(verdict, Fault)
            self._check(verdict, attempt)
            await asyncio.sleep(backoff_s(attempt, verdict.after_s, random.random()))
            attempt += not self._gate.is_down  # a dead server is not this request's fault

    def _check(self, fault: Fault, attempt: int) -> None:
        """Raises what ends the embedding; returns where it is worth another attempt."""
        self._last = fault.message
        if fault.remedy == "stop":
            raise RemoteError(
                f"{self._spec.base_url}{_PATH}: {fault.message}\nCheck {self._spec.key_env},"
                f" --embedding_model ({self._spec.model}) and TOGETHER_BASE_URL."
            )
        if fault.remedy != "retry":
            raise RunError(f"{self._spec.base_url}{_PATH} refused: {fault.message}")
        if attempt > _RETRIES:
            raise RunError(
                f"{self._spec.base_url}{_PATH} could not be asked, {attempt} times: {fault.message}"
            )
        if fault.after_s is not None and fault.after_s > _OUTAGE_S:
            raise RemoteError(
                f"{self._spec.base_url} asks to come back in {fault.after_s:,.0f} s. Run the same"
                " command again then; what is retrieved is kept."
            )

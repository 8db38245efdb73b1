"""Answers from an OpenAI-compatible API: each request a call of its own, many at a time.

Owns the tasks of one worker's event loop, their retries and their ends. The loop runs inside
`step`: nothing moves behind the worker's back. When to send is the gate's, what a reply means is
`remote.replies`'.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ragfleet.engines.answers import cut_at_stop
from ragfleet.engines.protocol import (
    Completion,
    EngineInfo,
    EngineSpec,
    Failure,
    Outcome,
    Prepared,
    Request,
    RequestKey,
)
from ragfleet.errors import ConfigError, RagfleetError, RemoteError
from ragfleet.prompts import PLAIN_STOP
from ragfleet.remote.asking import LengthField, RemotePrepared, common_body, prepare, stop_error
from ragfleet.remote.client import ApiClient
from ragfleet.remote.gate import Gate
from ragfleet.remote.headers import read_rates
from ragfleet.remote.ledger import budget_of
from ragfleet.remote.ledger_file import NAME, LedgerFile
from ragfleet.remote.pacing import WINDOW_S, backoff_s
from ragfleet.remote.replies import Answer, Fault
from ragfleet.remote.secret import read_key
from ragfleet.remote.spec import PROVIDERS

_TIMEOUT_S: Final = 600.0
_CLOSE_S: Final = 5.0
_LAST_ANSWERS_S: Final = 15.0
"""After a refusal that ends the run: what is on its way is paid for, and may still come."""
_LONG_WAIT_S: Final = 30.0
"""A Retry-After that the person who waits should know of."""

log = logging.getLogger(__name__)


class OpenAICompatibleEngine:
    """See `ragfleet.engines.protocol`."""

    def __init__(self, spec: EngineSpec, window_s: float = WINDOW_S) -> None:
        """`window_s`: the time over which the server counts; other than a minute in tests."""
        if spec.remote is None:
            raise ConfigError("The engine openai_compatible needs a remote API's settings.")
        self._spec, self._remote, self._window_s = spec, spec.remote, window_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[RequestKey, asyncio.Task[None]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None
        """A bug, or what ends the run for all workers."""
        self._error_at_s = 0.0
        self._is_waiting_said = False
        self._length_field: LengthField = "max_tokens"
        self._progress = 0
        self._num_submitted = 0
        self._rng = random.Random()

    def start(self) -> EngineInfo:
        spec, remote = self._spec, self._remote
        key = read_key(remote, os.environ)
        self._timeout_s = spec.request_timeout_s or _TIMEOUT_S
        self._client = ApiClient(remote, key, self._timeout_s)
        self._loop = asyncio.new_event_loop()
        path = None if spec.shared_dir is None else spec.shared_dir / NAME
        budget = budget_of(remote, spec.num_workers, self._timeout_s, self._window_s)
        self._account = LedgerFile(path, budget, spec.num_workers, spec.rank)
        self._gate = Gate(
            self._account.exchange,
            rank=spec.rank,
            max_concurrency=remote.max_concurrency,
            max_new_tokens=spec.sampling.max_new_tokens,
            loop=self._loop,
            window_s=self._window_s,
            say=self._say,
        )
        self._body = common_body(remote, spec.prompts, spec.sampling)
        notes = []
        if path is not None and not self._account.is_shared:
            notes.append(
                "files can't be locked here: each worker keeps to its own share of the limits"
            )
        return EngineInfo(
            name=f"{remote.provider} {remote.model} at {remote.base_url}",
            max_model_len=None,
            batch_size=remote.max_concurrency,
            notes=tuple(notes),
        )

    def prepare(self, request: Request) -> Prepared | Failure:
        return prepare(request, self._spec.prompts, self._remote)

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._tasks) < self._remote.max_concurrency

    def submit(self, prepared: Prepared) -> None:
        assert self._loop is not None, "start() comes first"
        assert isinstance(prepared, RemotePrepared)
        self._num_submitted += 1
        task = self._loop.create_task(self._answer(prepared, self._num_submitted))
        self._tasks[prepared.key] = task
        task.add_done_callback(self._on_end)

    def step(self, timeout_s: float) -> list[Outcome]:
        # A turn of the loop is progress: waiting for a limit or a dead server is what is to be
        # done then, and each call has a time limit of its own.
        self._progress += 1
        if not self._outcomes:
            self._raise_what_ended()
            self._run_loop(timeout_s)
        outcomes, self._outcomes = self._outcomes, []
        self._progress += len(outcomes)
        for outcome in outcomes:
            self._tasks.pop(outcome.key, None)
        return outcomes

    def progress(self) -> int:
        return self._progress

    def abort(self, key: RequestKey) -> None:
        task = self._tasks.pop(key, None)
        self._outcomes = [outcome for outcome in self._outcomes if outcome.key != key]
        if task is not None and not task.done():
            self._cancelled.add(task)
            task.cancel()

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None:
            return
        pending = {task for task in self._tasks.values() if not task.done()} | self._cancelled
        for task in pending:
            task.cancel()
        self._tasks.clear()
        if pending:
            loop.run_until_complete(asyncio.wait(pending, timeout=_CLOSE_S))
        self._gate.flush()
        self._gate.close()
        loop.run_until_complete(self._client.close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        self._account.close()

    # ---- the loop

    def _run_loop(self, timeout_s: float) -> None:
        loop = self._loop
        if loop is None or not (self._tasks or self._cancelled):
            return

        def turn() -> None:
            handle = loop.call_later(timeout_s, loop.stop)
            loop.run_forever()  # a finished request stops it
            handle.cancel()

        _outside_of_loops(turn)

    def _raise_what_ended(self) -> None:
        """An error of the run, once nothing that is paid for can come any more."""
        if self._error is not None:
            raise self._error
        if self._loop is None or self._gate.error is None:
            return
        now_s = time.monotonic()
        self._error_at_s = self._error_at_s or now_s
        if not self._gate.num_active or now_s > self._error_at_s + _LAST_ANSWERS_S:
            raise self._gate.error

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A request that ends without an outcome would be waited for forever: say what it was."""
        self._cancelled.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()

    def _stop(self, error: RagfleetError) -> None:
        """End the run: nothing more is sent, and `step` raises it after the last answers."""
        self._gate.error = self._gate.error or error

    def _say(self, text: str) -> None:
        log.warning("%s", text) if self._spec.say is None else self._spec.say(text)

    def _finish(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        assert self._loop is not None
        self._loop.stop()

    # ---- one request

    async def _answer(self, prepared: RemotePrepared, order: int) -> None:
        attempt = 1
        while True:
            ticket = await self._gate.enter(order, prepared.num_bytes)
            started_s = time.monotonic()
            verdict: Answer | Fault | None = None
            headers: Mapping[str, str] = {}
            try:
                verdict, headers = await self._client.ask({**self._body, **prepared.own})
            finally:
                self._gate.leave(ticket, verdict)
            if headers:
                period_s = PROVIDERS[self._remote.provider].limit_period_s
                self._gate.learn_rates(read_rates(headers, period_s))
            if isinstance(verdict, Answer):
                self._finish(self._completion(prepared, verdict, time.monotonic() - started_s))
                return
            if verdict.remedy == "stop":
                self._stop(stop_error(self._remote, verdict))
                return
            if verdict.remedy == "adapt" and self._adapt():
                continue
            if verdict.remedy != "retry" or attempt > self._spec.max_retries:
                tried = f" ({attempt} attempts)" if attempt > 1 else ""
                self._finish(
                    Failure(
                        key=prepared.key,
                        error_type=verdict.error_type,
                        error=verdict.message + tried,
                    )
                )
                return
            if verdict.after_s is not None and not self._may_wait(verdict.after_s):
                return
            await asyncio.sleep(backoff_s(attempt, verdict.after_s, self._rng.random()))
            attempt += not self._gate.is_down  # a dead server is not this request's fault

    def _may_wait(self, after_s: float) -> bool:
        """Whether a Retry-After is worth waiting for; says so when it is long."""
        most_s = self._remote.max_outage_s
        if after_s > most_s:
            self._stop(
                RemoteError(
                    f"{self._remote.base_url} asks to come back in {after_s:,.0f} s, longer than"
                    f" --max_outage_s {most_s:,.0f}. Run the same command again then."
                )
            )
            return False
        if after_s >= _LONG_WAIT_S and not self._is_waiting_said:
            self._is_waiting_said = True
            self._say(f"The server asks requests to come back in {after_s:,.0f} s (Retry-After).")
        return True

    def _adapt(self) -> bool:
        """Newer models take max_completion_tokens only; False when that was tried."""
        first = self._length_field == "max_tokens"
        self._length_field = "max_completion_tokens"
        self._body = common_body(
            self._remote, self._spec.prompts, self._spec.sampling, self._length_field
        )
        return first

    def _completion(self, prepared: RemotePrepared, answer: Answer, seconds: float) -> Completion:
        text, finish_reason = answer.text, answer.finish_reason
        if self._remote.api_format == "completion":
            # Not every server knows stop strings.
            cut = cut_at_stop(text, [*self._spec.sampling.stop, *PLAIN_STOP])
            if cut is not None:
                text, finish_reason = cut, "stop"
        return Completion(
            key=prepared.key,
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            reasoning=answer.reasoning,
            inference_time_s=seconds,
        )


def _outside_of_loops(turn: Callable[[], Any]) -> None:
    """Run a loop, also below a user's coroutine, whose own loop holds this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        turn()
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(turn).result()

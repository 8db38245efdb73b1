"""The engines around a user's QueryBasedInference.

Owns how the user's code is called, batched, awaited and blamed. Knows nothing of how the configured
(inner) engine works: it drives it through the protocol.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ragfleet.engines.protocol import (
    Completion,
    Engine,
    EngineInfo,
    EngineSpec,
    Failure,
    Outcome,
    Prepared,
    PromptSettings,
    Request,
    RequestKey,
)
from ragfleet.engines.query_based import AnswerFailed, Current, QueryBasedInference, current
from ragfleet.engines.user_class import describe, load_class, split_reference
from ragfleet.errors import ConfigError, RagfleetError
from ragfleet.prompts import CustomPrompts, RecordPromptError

DEFAULT_CONCURRENCY = 8
"""`async def generate_answer` calls at a time when --batch_size is not given."""
_CLOSE_S = 5.0
"""How long cancelled calls may take to end."""


def make_query_based(
    spec: EngineSpec, reference: str, inner_name: str, make_inner: Callable[[EngineSpec], Engine]
) -> Engine:
    """The engine for `file.py:ClassName`; imports the user's file. Raises ConfigError."""
    file, name = split_reference(reference)
    cls = load_class(reference, QueryBasedInference)
    kind: type[PromptEngine | SyncEngine | AsyncEngine] = SyncEngine
    if cls.generate_answer is QueryBasedInference.generate_answer:
        kind = PromptEngine
    elif inspect.iscoroutinefunction(cls.generate_answer):
        kind = AsyncEngine
    return kind(spec, cls, file, f"{file.name}:{name} around {inner_name}", make_inner)


class QueryBasedEngine:
    """What the three kinds share: the user's instance and the inner engine."""

    def __init__(
        self,
        spec: EngineSpec,
        cls: type[QueryBasedInference],
        file: Path,
        name: str,
        make_inner: Callable[[EngineSpec], Engine],
    ) -> None:
        self._spec = spec
        self._cls = cls
        self._file = file
        self._name = name
        self._make_inner = make_inner
        self._inner: Engine | None = None
        self._lock = threading.RLock()  # a user's asyncio.to_thread may call `answer`
        self._pid = os.getpid()
        self._num_calls = 0
        self._dead: RagfleetError | None = None
        self._backend: QueryBasedInference

    def _start_backend(self) -> None:
        sampling = self._spec.sampling
        try:
            self._backend = self._cls(
                model_path=None if self._spec.model_dir is None else str(self._spec.model_dir),
                inference_type=self._spec.inference_type,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            self._backend._runner = self
            self._backend.setup()
        except RagfleetError:
            raise
        except (Exception, SystemExit) as error:  # user's code
            raise ConfigError(
                f"--inference_class: {self._cls.__name__} cannot be set up:"
                f" {describe(error, self._file)}"
            ) from error

    def _start_inner(self) -> EngineInfo:
        prompts = self._spec.prompts
        if self._cls.create_prompt is not QueryBasedInference.create_prompt:
            fields = {f.name: getattr(prompts, f.name) for f in dataclasses.fields(PromptSettings)}
            prompts = CustomPrompts(**fields, user_message=self._user_message)
        inner = self._make_inner(dataclasses.replace(self._spec, prompts=prompts))
        info = inner.start()
        self._inner = inner
        return info

    def _user_message(
        self, record: Mapping[str, Any], query: str, context: str, retrieval_method: str | None
    ) -> str:
        try:
            text = self._backend.create_prompt(query, context, retrieval_method)
        except RecordPromptError:
            raise
        except (Exception, SystemExit) as error:  # user's code
            raise RecordPromptError(describe(error, self._file), "generation_error") from error
        finally:
            self._end_forks()
        if not isinstance(text, str):
            raise RecordPromptError(
                f"{self._cls.__name__}.create_prompt returned {type(text).__name__}, not a string",
                "generation_error",
            )
        return str.__str__(text)

    def _end_forks(self) -> None:
        """A fork that comes back out of the user's code would be this worker a second time."""
        if os.getpid() != self._pid:
            os._exit(1)

    @property
    def prompts(self) -> PromptSettings:
        return self._spec.prompts

    def answer(self, query: str, context: str, retrieval_method: str | None) -> str:
        """One prompt through the inner engine, now. Raises AnswerFailed."""
        state = current.get(None)
        if state is None:
            raise RuntimeError(
                "super().generate_answer works only while a record is being answered, not in"
                " setup(); in threads of your own by contextvars.copy_context().run"
            )
        with self._lock:
            try:
                outcome = self._run_inner(state, query, context, retrieval_method)
            except RagfleetError as error:
                self._dead = error  # even where the user's code catches it
                raise
        if isinstance(outcome, Failure):
            raise AnswerFailed(outcome)
        state.finish_reason = outcome.finish_reason
        if outcome.prompt_tokens is not None:
            state.prompt_tokens = (state.prompt_tokens or 0) + outcome.prompt_tokens
        if outcome.cached_tokens is not None:
            state.cached_tokens = (state.cached_tokens or 0) + outcome.cached_tokens
        if outcome.completion_tokens is not None:
            state.completion_tokens = (state.completion_tokens or 0) + outcome.completion_tokens
        return outcome.text

    def _run_inner(
        self, state: Current, query: str, context: str, retrieval_method: str | None
    ) -> Outcome:
        if self._inner is None:
            self._start_inner()
        assert self._inner is not None
        request = msgspec.structs.replace(
            state.request,
            query=query,
            context=context,
            retrieval_method=retrieval_method,
            seed=_nth_seed(state.request.seed, state.num_calls),
        )
        state.num_calls += 1
        prepared = self._inner.prepare(request)
        if isinstance(prepared, Failure):
            return prepared
        self._inner.submit(prepared)
        while True:
            for outcome in self._inner.step(1.0):
                return outcome

    def _outcome(self, state: Current, call: Callable[[], Any]) -> Outcome:
        """What the user's code made of one request. Raises what ends the engine."""
        key = state.request.key
        self._num_calls += 1
        try:
            text = call()
        except asyncio.CancelledError:
            return _failed(key, "generate_answer was cancelled")
        except AnswerFailed as error:
            return msgspec.structs.replace(error.failure, key=key)
        except (Exception, SystemExit) as error:  # user's code: any exception is a failure row
            if self._dead is not None:
                raise self._dead from error
            kind = "timeout" if isinstance(error, TimeoutError) else "generation_error"
            # TimeoutError and ConnectionError may pass; other exceptions say so themselves.
            passing = isinstance(error, (TimeoutError, ConnectionError))
            retryable = passing or bool(getattr(error, "retryable", False))
            return _failed(key, describe(error, self._file), kind, retryable)
        finally:
            self._end_forks()
        if self._dead is not None:
            raise self._dead
        if not isinstance(text, str):
            if inspect.iscoroutine(text):
                text.close()
            what = f"{self._cls.__name__}.generate_answer returned {type(text).__name__}"
            return _failed(key, f"{what}, not a string")
        return Completion(
            key=key,
            text=str.__str__(text),  # of a subclass (numpy's, a parser's) the text alone
            finish_reason=state.finish_reason,
            prompt_tokens=state.prompt_tokens,
            completion_tokens=state.completion_tokens,
            cached_tokens=state.cached_tokens,
        )

    def prepare(self, request: Request) -> Prepared | Failure:
        return Prepared(request=request, prompt=request.query)

    def progress(self) -> int:
        """Calls begun, and what the inner engine did."""
        return self._num_calls + (self._inner.progress() if self._inner is not None else 0)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()


class PromptEngine(QueryBasedEngine):
    """Only `create_prompt` (or `setup`) is the user's: the inner engine does everything else."""

    _engine: Engine

    def start(self) -> EngineInfo:
        self._start_backend()
        info = self._start_inner()
        assert self._inner is not None
        self._engine = self._inner
        return dataclasses.replace(info, name=f"{self._name}: {info.name}")

    def answer(self, query: str, context: str, retrieval_method: str | None) -> str:
        """Not here: the inner engine has other requests, whose answers would be taken for this."""
        raise RuntimeError(
            "create_prompt and setup() can't ask for an answer: do it in a generate_answer of your"
            " own, and give its super().generate_answer what comes out"
        )

    def prepare(self, request: Request) -> Prepared | Failure:
        token = current.set(Current(request))
        try:
            return self._engine.prepare(request)
        finally:
            current.reset(token)

    def has_room(self, prepared: Prepared) -> bool:
        return self._engine.has_room(prepared)

    def submit(self, prepared: Prepared) -> None:
        self._engine.submit(prepared)

    def step(self, timeout_s: float) -> list[Outcome]:
        return self._engine.step(timeout_s)

    def abort(self, key: RequestKey) -> None:
        self._engine.abort(key)


class SyncEngine(QueryBasedEngine):
    """A plain `generate_answer`: one request at a time, inside `step`."""

    _waiting: Prepared | None = None

    def start(self) -> EngineInfo:
        self._start_backend()
        return EngineInfo(name=self._name, max_model_len=None, may_block=True)

    def has_room(self, prepared: Prepared) -> bool:
        return self._waiting is None

    def submit(self, prepared: Prepared) -> None:
        self._waiting = prepared

    def step(self, timeout_s: float) -> list[Outcome]:
        if self._waiting is None:
            return []
        request, self._waiting = self._waiting.request, None
        state = Current(request)
        token = current.set(state)
        try:
            outcome = self._outcome(
                state,
                lambda: self._backend.generate_answer(
                    request.query, request.context, request.retrieval_method
                ),
            )
        finally:
            current.reset(token)
        return [outcome]

    def abort(self, key: RequestKey) -> None:
        if self._waiting is not None and self._waiting.key == key:
            self._waiting = None


class AsyncEngine(QueryBasedEngine):
    """An `async def generate_answer`: tasks of an own event loop, which runs inside `step`."""

    _loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> EngineInfo:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[asyncio.Task[Any], Current] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()
        self._concurrency = self._spec.batch_size or DEFAULT_CONCURRENCY
        self._start_backend()
        return EngineInfo(
            name=self._name, max_model_len=None, batch_size=self._concurrency, may_block=True
        )

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._tasks) < self._concurrency

    def submit(self, prepared: Prepared) -> None:
        assert self._loop is not None, "start() comes first"
        state = Current(prepared.request)
        self._tasks[self._loop.create_task(self._call(state))] = state

    async def _call(self, state: Current) -> Any:
        current.set(state)  # in the task's own context
        request, limit_s = state.request, self._spec.request_timeout_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await self._backend.generate_answer(
                    request.query, request.context, request.retrieval_method
                )
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"no answer within {limit_s} s") from None
            raise
        except SystemExit as error:  # out of a task it would end the loop and the neighbours
            raise RuntimeError(f"SystemExit: {error}") from error

    def step(self, timeout_s: float) -> list[Outcome]:
        pending = set(self._tasks) | self._cancelled
        if not pending:
            return []
        assert self._loop is not None
        done, _ = self._loop.run_until_complete(
            asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        )
        self._cancelled -= done
        return [
            self._outcome(self._tasks.pop(task), task.result)
            for task in done
            if task in self._tasks
        ]

    def abort(self, key: RequestKey) -> None:
        for task in [task for task, state in self._tasks.items() if state.request.key == key]:
            del self._tasks[task]
            task.cancel()
            self._cancelled.add(task)

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            pending = set(self._tasks) | self._cancelled
            for task in pending:
                task.cancel()
            if pending:
                self._loop.run_until_complete(asyncio.wait(pending, timeout=_CLOSE_S))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
        super().close()


def _failed(
    key: RequestKey, error: str, error_type: str = "generation_error", retryable: bool = False
) -> Failure:
    return Failure(key=key, error_type=error_type, error=error, retryable=retryable)


def _nth_seed(seed: int | None, num_calls: int) -> int | None:
    """A stream of its own for each call within a request; the first is the request's."""
    if seed is None or num_calls == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{num_calls}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")

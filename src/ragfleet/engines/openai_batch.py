"""Answers from an API's batch endpoints: files of requests, done by the provider within a day.

Owns which request is in which part and what becomes of it. Everything it does at the server is in
the journal before and after, so a process that is killed at any point is continued by the next one:
what may have been done is looked for before it is done again, and replies that were downloaded are
taken from there. Requests that a batch left undone go into another.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

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
from ragfleet.errors import ConfigError, RemoteError
from ragfleet.remote.asking import LengthField, RemotePrepared, common_body, prepare, stop_error
from ragfleet.remote.batch_api import BatchApi, CallFailed
from ragfleet.remote.batch_journal import DONE, Journal, Part
from ragfleet.remote.batch_lines import key_of_request, lines_of, read_line, request_line
from ragfleet.remote.client import ApiClient
from ragfleet.remote.pacing import backoff_s
from ragfleet.remote.replies import Answer, Fault, broken
from ragfleet.remote.secret import read_key

_CALL_TIMEOUT_S: Final = 1800.0
_TICK_S: Final = 5.0
_MOST_PARTS: Final = 8
"""Under way at a time; the requests of each are held in memory."""
_Result = TypeVar("_Result")


class OpenAIBatchEngine:
    """See `ragfleet.engines.protocol`. One worker alone may run it."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.remote is None or spec.run_dir is None:
            raise ConfigError("The batch engine needs a remote API's settings and a run's folder.")
        self._spec, self._remote = spec, spec.remote
        self._directory: Path = spec.run_dir / "batch"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[RequestKey, RemotePrepared] = {}
        self._attempts: dict[RequestKey, int] = {}
        self._part_of: dict[RequestKey, str] = {}
        """Requests that a part under way holds."""
        self._found: dict[RequestKey, tuple[Path, int, int]] = {}
        """Whole answers in downloaded files."""
        self._open: dict[RequestKey, bytes] = {}
        """The next part."""
        self._open_bytes = 0
        self._most_requests = self._remote.batch_requests
        """Of a part; less where the provider takes no more tokens at a time."""
        self._length_field: LengthField = "max_tokens"
        self._outcomes: list[Outcome] = []
        self._look_again_s = 0.0
        self._trouble_since_s: float | None = None
        self._num_troubles = 0
        self._progress = 0
        self._rng = random.Random()

    def start(self) -> EngineInfo:
        remote = self._remote
        self._client = ApiClient(remote, read_key(remote, os.environ), _CALL_TIMEOUT_S)
        self._loop = asyncio.new_event_loop()
        self._api = BatchApi(remote, self._client)
        self._journal = Journal(self._directory)
        for part in self._journal.parts.values():
            if part.state == DONE:
                faults = self._index(part).values()
                if any(fault.remedy == "adapt" for fault in faults):
                    self._length_field = "max_completion_tokens"
            else:
                for line in lines_of(self._journal.requests(part)):
                    self._part_of[key_of_request(line)] = part.name
        under_way = sum(part.state != DONE for part in self._journal.parts.values())
        notes = [f"{under_way} batches of an earlier start are under way"] if under_way else []
        return EngineInfo(
            name=f"batches of {remote.provider} {remote.model} at {remote.base_url}",
            max_model_len=None,
            batch_size=remote.batch_requests,
            survives=True,
            notes=tuple(notes),
        )

    def prepare(self, request: Request) -> Prepared | Failure:
        prepared = prepare(request, self._spec.prompts, self._remote)
        if isinstance(prepared, Failure):
            return prepared
        num_bytes = len(self._line(prepared))
        if num_bytes > self._remote.batch_bytes:
            return Failure(
                key=request.key,
                error_type="too_long",
                error=f"the request has {num_bytes:,} bytes, more than a batch file may have"
                f" ({self._remote.batch_bytes:,})",
            )
        return msgspec.structs.replace(prepared, num_bytes=num_bytes)

    def has_room(self, prepared: Prepared) -> bool:
        if prepared.key in self._found or prepared.key in self._part_of:
            return True
        assert isinstance(prepared, RemotePrepared)
        return (
            len(self._open) < self._most_requests
            and self._open_bytes + prepared.num_bytes <= self._remote.batch_bytes
            and len(self._under_way()) < _MOST_PARTS
        )

    def submit(self, prepared: Prepared) -> None:
        assert isinstance(prepared, RemotePrepared)
        self._asked[prepared.key] = prepared
        if prepared.key in self._found:
            self._answer(prepared.key)
        elif prepared.key not in self._part_of:
            self._put(prepared)

    def step(self, timeout_s: float) -> list[Outcome]:
        self._progress += 1  # waiting is what is to be done for most of a day
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes
        while self._open:  # the worker has no more, or there is no more room
            self._build()
        now_s = time.monotonic()
        if self._look_again_s > now_s:
            self._run(asyncio.sleep(min(timeout_s, self._look_again_s - now_s)))
            return []
        self._look_again_s = now_s + self._remote.batch_poll_s
        self._advance_all()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def progress(self) -> int:
        return self._progress

    def abort(self, key: RequestKey) -> None:
        self._asked.pop(key, None)
        line = self._open.pop(key, None)
        self._open_bytes -= len(line or b"")
        self._outcomes = [outcome for outcome in self._outcomes if outcome.key != key]

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.run_until_complete(self._client.close())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            self._journal.close()

    # ---- parts

    def _build(self) -> None:
        """A part of what is open, within the limits of a file."""
        chosen: list[RequestKey] = []
        num_bytes = 0
        for key, line in self._open.items():
            num_bytes += len(line)
            is_full = len(chosen) >= self._most_requests or num_bytes > self._remote.batch_bytes
            if chosen and is_full:
                break
            chosen.append(key)
        lines = [self._open.pop(key) for key in chosen]
        self._open_bytes -= sum(map(len, lines))
        part = self._journal.build(lines, self._length_field)
        self._part_of |= dict.fromkeys(chosen, part.name)
        self._look_again_s = 0.0

    def _under_way(self) -> list[Part]:
        return [part for part in self._journal.parts.values() if part.state != DONE]

    def _advance_all(self) -> None:
        for part in self._under_way():
            try:
                self._run(self._advance(part))
            except CallFailed as error:
                self._wait_out(error)
                return
            self._num_troubles, self._trouble_since_s = 0, None

    async def _advance(self, part: Part) -> None:
        """From where a part is, as far as it goes now."""
        part = msgspec.structs.replace(part)
        name = f"ragfleet-{part.nonce}.jsonl"
        if part.state == "uploading":
            part.file_id = await self._api.find_file(name) or ""
        if part.state in ("built", "uploading"):
            if not part.file_id:
                self._note(part, "uploading")
                path = self._journal.requests(part)
                part.file_id = await self._api.upload(path, name)
            self._note(part, "uploaded")
        if part.state == "submitting":
            found = await self._api.find_batch(part.file_id)
            part.batch_id = found.id if found is not None else ""
        if part.state in ("uploaded", "submitting"):
            if not part.batch_id:
                self._note(part, "submitting")
                part.batch_id = (await self._api.submit(part.file_id, part.nonce)).id
            self._note(part, "submitted")
        if part.state == "submitted":
            batch = await self._api.look(part.batch_id)
            if not batch.has_ended:
                return
            part.status = batch.status
            if batch.status == "failed":
                self._refused(part, *batch.first_error())
                return
            part.output_file_id = batch.output_file_id or ""
            part.error_file_id = batch.error_file_id or ""
            self._note(part, "ended")
        if part.output_file_id:
            data = await self._api.download(part.output_file_id)
            self._journal.save_replies(part, "output", data)
        if part.error_file_id:
            data = await self._api.download(part.error_file_id)
            self._journal.save_replies(part, "errors", data)
        self._note(part, DONE)
        self._take(part)

    def _note(self, part: Part, state: Any) -> None:
        part.state = state
        self._journal.write(msgspec.structs.replace(part))

    def _refused(self, part: Part, code: str, message: str) -> None:
        """The provider did not take the file: nothing of it was done or is charged."""
        others = [other for other in self._under_way() if other.name != part.name]
        if code == "token_limit_exceeded" and any(o.state == "submitted" for o in others):
            part.batch_id = ""  # of what may be queued: it goes when others are done
            self._note(part, "uploaded")
            return
        mine = [key for key, name in self._part_of.items() if name == part.name]
        self._note(part, DONE)  # so that the next start, too, sends its requests in another part
        if code == "token_limit_exceeded" and len(mine) > 1:
            self._most_requests = max(1, len(mine) // 2)
            for key in mine:
                del self._part_of[key]
                if key in self._asked:
                    self._put(self._asked[key])
            return
        raise RemoteError(
            f"{self._remote.base_url} refused the batch {part.batch_id}:"
            f" {self._client.redact(message)[:400]} ({code or 'no code'}). Its file is"
            f" {self._journal.requests(part)}; the same command again submits its requests anew."
        )

    def _take(self, part: Part) -> None:
        """Answers of a part that is done; what it left undone goes into the next one."""
        faults = self._index(part)
        mine = [key for key, name in self._part_of.items() if name == part.name]
        # An expired batch that finished something is no try of those whose turn did not come.
        is_late = part.status == "expired" and any(key in self._found for key in mine)
        for key in mine:
            del self._part_of[key]
            prepared = self._asked.get(key)
            if prepared is None:  # no longer asked for
                continue
            fault = faults.get(key, broken("the batch gave this request no reply", "no_reply"))
            self._attempts[key] = self._attempts.get(key, 0) + (not is_late)
            if key in self._found:
                self._answer(key)
            elif fault.remedy == "stop":
                raise stop_error(self._remote, fault)
            elif fault.remedy == "adapt" and part.length_field == "max_tokens":
                self._length_field = "max_completion_tokens"
                self._put(prepared)
            elif fault.remedy == "retry" and self._attempts[key] <= self._spec.max_retries:
                self._put(prepared)
            else:
                self._outcomes.append(
                    Failure(key=key, error_type=fault.error_type, error=fault.message)
                )
        if part.status == "cancelled" and self._open:
            raise RemoteError(
                f"The batch {part.batch_id} was cancelled with {len(self._open):,} requests"
                " undone. The same command again submits these."
            )

    def _index(self, part: Part) -> dict[RequestKey, Fault]:
        """Where the whole answers of a downloaded part are; returns what it failed at."""
        faults: dict[RequestKey, Fault] = {}
        for path in self._journal.replies(part):
            offset = 0
            for line in lines_of(path):
                read = read_line(line)
                if read is not None:
                    key, verdict = read
                    if isinstance(verdict, Answer):
                        self._found[key] = (path, offset, len(line))
                    else:
                        faults[key] = self._client.clean(verdict)
                offset += len(line)
        return faults

    def _answer(self, key: RequestKey) -> None:
        path, offset, length = self._found[key]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read = read_line(os.pread(fd, length, offset))
        finally:
            os.close(fd)
        assert read is not None
        answer = read[1]
        assert isinstance(answer, Answer)
        del self._asked[key]
        self._progress += 1
        self._outcomes.append(
            Completion(
                key=key,
                text=answer.text,
                finish_reason=answer.finish_reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                reasoning=answer.reasoning,
                inference_time_s=0.0,
            )
        )

    def _line(self, prepared: RemotePrepared) -> bytes:
        body = common_body(
            self._remote, self._spec.prompts, self._spec.sampling, self._length_field
        )
        return request_line(prepared.key, self._remote.path, {**body, **prepared.own})

    def _put(self, prepared: RemotePrepared) -> None:
        line = self._line(prepared)
        self._open[prepared.key] = line
        self._open_bytes += len(line)

    # ---- the server

    def _wait_out(self, error: CallFailed) -> None:
        """Pause after a call that failed; end the run where pausing does not help."""
        fault = error.fault
        if fault.status in (404, 405):
            raise RemoteError(
                f"{self._remote.base_url}: {fault.message}\nA server without batch endpoints is"
                " asked with --api_mode realtime, or answers what `ragfleet export` writes. One"
                " that has them knows a batch only with the key that submitted it."
            ) from None
        if fault.remedy != "retry":
            raise stop_error(self._remote, fault) from None
        if (fault.after_s or 0.0) > self._remote.max_outage_s:
            raise RemoteError(
                f"{self._remote.base_url} asks to come back in {fault.after_s:,.0f} s, longer than"
                f" --max_outage_s {self._remote.max_outage_s:,.0f}. Run the same command then."
            ) from None
        now_s = time.monotonic()
        self._trouble_since_s = self._trouble_since_s or now_s
        if now_s - self._trouble_since_s > self._remote.max_outage_s:
            raise RemoteError(f"{self._remote.base_url} is dead: {fault.message}") from None
        self._num_troubles += 1
        wait_s = backoff_s(self._num_troubles, fault.after_s, self._rng.random())
        self._look_again_s = now_s + wait_s

    def _run(self, call: Coroutine[Any, Any, _Result]) -> _Result:
        assert self._loop is not None, "start() comes first"
        return self._loop.run_until_complete(self._ticking(call))

    async def _ticking(self, call: Coroutine[Any, Any, _Result]) -> _Result:
        """An upload may take long and has a time limit of its own: until then it is progress."""

        async def tick() -> None:
            while True:
                self._progress += 1
                await asyncio.sleep(_TICK_S)

        ticker = asyncio.ensure_future(tick())
        try:
            return await call
        finally:
            ticker.cancel()

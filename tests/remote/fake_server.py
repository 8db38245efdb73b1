"""An OpenAI-compatible server on loopback that can be made to fail in every way, in seeded order.

It enforces requests and tokens a minute by its own clock over a sliding window, repeats the key it
was sent in every error, and remembers what arrived and when. As a program:

    python tests/remote/fake_server.py --latency_s 0.1     prints its base URL, ends with its stdin
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL = "small-model"
KEY = "sk-secret-0123456789abcdef"
FAULTS = ("429", "429+", "500", "503", "reset", "torn", "empty", "unended", "stall")


@dataclass
class Settings:
    key: str | None = None
    """None: any key will do."""
    latency_s: float = 0.0
    window_s: float = 60.0
    requests: int | None = None
    """Requests taken in any window."""
    tokens: int | None = None
    faults: Mapping[str, float] = field(default_factory=dict)
    """Share of requests that meet each fault."""
    seed: int = 0
    stall_s: float = 30.0
    headers: bool = False
    """Tell the limits in x-ratelimit-* headers."""
    only_completion_tokens: bool = False
    """Refuse `max_tokens`, as newer models of OpenAI do."""
    max_context: int = 10_000_000
    is_down: bool = False
    tells_when: bool = True
    """Send Retry-After with the refusals of the limit."""
    retry_after_s: float = 0.2
    """Of the fault 429+."""


@dataclass
class Arrival:
    at_s: float
    tokens: int
    status: int | str
    digest: str


@dataclass
class Reply:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: str = ""
    """reset: half of it, then a reset; torn: half of it as if it were all."""


def answer_to(text: str) -> str:
    """What the server answers to a prompt: only the right request can have it."""
    return f"answer {hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def count_tokens(body: Mapping[str, Any]) -> int:
    """As OpenAI counts for its limits: the prompt and the most that may be generated."""
    return len(prompt_of(body)) // 4 + int(
        body.get("max_tokens") or body.get("max_completion_tokens") or 16
    )


def prompt_of(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return "".join(message["content"] for message in body["messages"])
    return str(body["prompt"])


class FakeServer:
    """Runs in a thread of its own. `with FakeServer(Settings(...)) as server: server.base_url`."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.arrivals: list[Arrival] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.in_flight = 0
        self.most_in_flight = 0
        self.routes: dict[tuple[str, str], Callable[..., Reply]] = {}
        """(method, pattern) → handler(match, headers, body); for the batch endpoints."""
        self.before_reply: Callable[[str, str], None] = lambda method, path: None
        self._rng = random.Random(self.settings.seed)
        self._window: deque[tuple[float, int]] = deque()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    # ---- running

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._transports: set[asyncio.Transport] = set()
        server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", 0, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for transport in list(self._transports):
            transport.abort()

    # ---- what it says

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        settings = self.settings
        key = headers.get("authorization", "").removeprefix("Bearer ")
        self.keys.add(key)
        if settings.is_down:
            return Reply(503, _error("down"))
        if settings.key is not None and key != settings.key:
            return Reply(401, _error(f"Incorrect API key provided: {key}", "invalid_api_key"))
        for (wanted, pattern), handler in self.routes.items():
            match = re.fullmatch(pattern, path.partition("?")[0])
            if match and wanted == method:
                reply = handler(match, headers, body)
                self.before_reply(method, path)
                return reply
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return Reply(404, _error(f"no {path}"))
        return self._complete(json.loads(body), key)

    def _complete(self, body: dict[str, Any], key: str) -> Reply:
        settings = self.settings
        now_s = time.monotonic()
        tokens = count_tokens(body)
        arrival = Arrival(now_s, tokens, 200, answer_to(prompt_of(body)))
        self.arrivals.append(arrival)
        self.bodies.append(body)
        reply = self._limited(now_s, tokens) or self._faulty(key) or self.answer(body, key)
        reply.delay_s += settings.latency_s
        arrival.status = reply.cut or reply.status
        if settings.headers:
            reply.headers |= self._limit_headers()
        return reply

    def _limited(self, now_s: float, tokens: int) -> Reply | None:
        settings, window = self.settings, self._window
        while window and window[0][0] <= now_s - settings.window_s:
            window.popleft()
        too_many = settings.requests is not None and len(window) >= settings.requests
        used = sum(size for _, size in window) if settings.tokens is not None else 0
        if too_many or (settings.tokens is not None and used + tokens > settings.tokens):
            wait_s = window[0][0] + settings.window_s - now_s if window else 1.0
            return Reply(
                429,
                _error("limit", "rate_limit_exceeded"),
                {"retry-after": f"{wait_s:.3f}"} if settings.tells_when else {},
            )
        window.append((now_s, tokens))
        return None

    def _limit_headers(self) -> dict[str, str]:
        settings, minute = self.settings, 60 / self.settings.window_s
        headers = {}
        if settings.requests is not None:
            headers["x-ratelimit-limit-requests"] = str(int(settings.requests * minute))
            headers["x-ratelimit-remaining-requests"] = str(settings.requests - len(self._window))
            headers["x-ratelimit-reset-requests"] = f"{settings.window_s:g}s"
        if settings.tokens is not None:
            headers["x-ratelimit-limit-tokens"] = str(int(settings.tokens * minute))
        return headers

    def _faulty(self, key: str) -> Reply | None:
        draw = self._rng.random()
        for name in FAULTS:
            draw -= self.settings.faults.get(name, 0.0)
            if draw < 0:
                return self.fault(name, key)
        return None

    def fault(self, name: str, key: str) -> Reply:
        if name in ("429", "429+"):
            after_s = f"{self.settings.retry_after_s:g}"
            after = {"retry-after": after_s} if name == "429+" else {}
            return Reply(429, _error(f"slow down, {key}", "rate_limit_exceeded"), after)
        if name in ("500", "503"):
            return Reply(int(name), _error(f"something broke for {key}"))
        whole = {"choices": [{"message": {"content": "not whole"}, "finish_reason": "stop"}]}
        if name in ("reset", "torn"):
            return Reply(200, whole, cut=name)
        if name == "empty":
            return Reply(200, {"choices": [], "usage": None})
        if name == "unended":
            whole["choices"][0]["finish_reason"] = None  # type: ignore[assignment]
            return Reply(200, whole)
        return Reply(200, whole, delay_s=self.settings.stall_s, cut="reset")

    def answer(self, body: dict[str, Any], key: str) -> Reply:
        """The reply of a healthy server."""
        settings = self.settings
        if body["model"] != MODEL:
            return Reply(404, _error(f"no model; key {key}", "model_not_found"))
        if settings.only_completion_tokens and "max_tokens" in body:
            error = _error("use max_completion_tokens", "unsupported_parameter", "max_tokens")
            return Reply(400, error)
        prompt = prompt_of(body)
        if "FILTER" in prompt:
            return Reply(400, _error("no", "content_filter"))
        if "BAD" in prompt:
            return Reply(400, _error(f"bad, {key}", "invalid_value", "messages"))
        num_prompt = len(prompt) // 4
        if num_prompt > settings.max_context:
            return Reply(400, _error("too much", "context_length_exceeded", "messages"))
        text = answer_to(prompt)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
        usage = {"prompt_tokens": num_prompt, "completion_tokens": 2}
        return Reply(200, {"choices": [choice], "usage": usage})

    # ---- what tests ask

    def most_in_a_window(
        self, weigh: Callable[[Arrival], int] = lambda arrival: 1, window_s: float | None = None
    ) -> int:
        """The most that arrived in any window (of the settings' length), refused or not."""
        window_s = window_s or self.settings.window_s
        window: deque[Arrival] = deque()
        most = total = 0
        for arrival in self.arrivals:
            window.append(arrival)
            total += weigh(arrival)
            while window[0].at_s <= arrival.at_s - window_s:
                total -= weigh(window.popleft())
            most = max(most, total)
        return most


Serve = Callable[..., FakeServer]
"""The `serve` fixture: `serve(faults={"500": 0.1}, seed=3)`."""
Ask = Callable[..., Any]
"""The `connect` fixture: `connect(server, max_concurrency=4)`, a started engine."""


class _Connection(asyncio.Protocol):
    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server._transports.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._server._transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for method, path, headers, body in self._requests():
            server = self._server
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            reply = server.handle(method, path, headers, body)
            if reply.delay_s:
                asyncio.get_running_loop().call_later(reply.delay_s, self._write, reply)
            else:
                self._write(reply)

    def _requests(self) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            headers = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            stop = end + 4 + int(headers.get("content-length", "0"))
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            method, path, _ = first.split(" ", 2)
            yield method, path, headers, body

    def _write(self, reply: Reply) -> None:
        self._server.in_flight -= 1
        transport = self._transport
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        if reply.cut == "torn":
            body = body[: len(body) // 2]
        length = len(body)
        if reply.cut == "reset":
            body = body[: len(body) // 2]
        lines = [f"HTTP/1.1 {reply.status} X", "content-type: application/json"]
        lines += [f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        with contextlib.suppress(OSError):
            transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            if reply.cut == "reset":
                transport.close()


def _error(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code, "param": param}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency_s", type=float, default=0.0)
    options = parser.parse_args(argv)
    with FakeServer(Settings(latency_s=options.latency_s)) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

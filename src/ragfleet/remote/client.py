"""The SDK, asked for one thing at a time: a body in, a verdict out.

The one module that imports `openai`. Its retries are switched off (the gate and the engine know
more), and replies are read as bytes: making typed objects of them takes longer than all the rest.
Connections are pooled by aiohttp where it is installed, which costs less than half of httpx.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ragfleet.errors import ConfigError
from ragfleet.remote.replies import Answer, Fault, broken, read_reply
from ragfleet.remote.secret import ApiKey
from ragfleet.remote.spec import PROVIDERS, RemoteSpec

try:
    import openai

    try:
        import httpx2 as httpx  # what openai 3 speaks with
    except ImportError:
        import httpx
except ImportError as error:
    raise ConfigError(
        f"A remote API needs the openai package ({error}); pip install 'ragfleet[remote]'."
    ) from None

_CONNECT_S = 20.0
_STAY = {"follow_redirects": False}
"""Prompts go to the server that the user named: to no other, and never as the GET that a redirect
turns a POST into."""
_CHATTY = ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp")


class ApiClient:
    """One pooled connection set to one server. Used from one event loop."""

    def __init__(self, spec: RemoteSpec, key: ApiKey | None, timeout_s: float) -> None:
        for name in _CHATTY:  # at DEBUG they print requests; headers are nobody's business
            logging.getLogger(name).setLevel(logging.WARNING)
        self._spec, self._key, self._timeout_s = spec, key, timeout_s
        limits = httpx.Limits(
            max_connections=spec.max_concurrency + 8,
            max_keepalive_connections=spec.max_concurrency + 8,
        )
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        try:
            try:
                http = openai.DefaultAioHttpClient(limits=limits, timeout=timeout)
            except (RuntimeError, AttributeError):  # without aiohttp
                http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout)
        except (httpx.InvalidURL, ValueError, ImportError):  # whose words may hold a password
            raise ConfigError(
                "A proxy of the environment is no address that can be used; see HTTP_PROXY,"
                " HTTPS_PROXY and ALL_PROXY."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"The certificates of SSL_CERT_FILE or SSL_CERT_DIR can't be read: {error}"
            ) from None
        # The SDK would send these from the environment to any server.
        own = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        is_openai = spec.base_url == PROVIDERS["openai"].base_url
        self.sdk = openai.AsyncOpenAI(
            default_headers=None if is_openai else own,
            api_key=key.reveal() if key is not None else "none",
            base_url=spec.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=http,
        )

    async def ask(
        self,
        body: Mapping[str, Any],
        path: str | None = None,
        read: Callable[[int, Mapping[str, str], bytes], Answer | Fault] = read_reply,
    ) -> tuple[Answer | Fault, Mapping[str, str]]:
        """(verdict, headers of the reply). Raises nothing but cancellation.

        Args:
            path: of another endpoint than the run's, whose replies `read` understands.
        """
        headers: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self.sdk.post(
                    path or self._spec.path, body=body, cast_to=httpx.Response, options=_STAY
                )
                headers = response.headers
                verdict = read(response.status_code, headers, response.content)
                return self.clean(verdict) if isinstance(verdict, Fault) else verdict, headers
        except openai.APIStatusError as error:
            headers = error.response.headers
            return self._refusal(error), headers
        except TimeoutError:
            return self._too_late(), headers
        except openai.APIConnectionError as error:
            return self._no_connection(error), headers
        except openai.OpenAIError as error:
            return broken(f"the SDK can't read the reply ({type(error).__name__})"), headers

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> bytes | Fault:
        """One call beside the answering of requests. Raises nothing but cancellation."""
        options: dict[str, Any] = {"params": dict(query)} if query else {}
        if method == "GET":
            return await self._bytes_of(self.sdk.get(path, cast_to=httpx.Response, options=options))
        return await self._bytes_of(
            self.sdk.post(path, cast_to=httpx.Response, body=body, options={**options, **_STAY})
        )

    async def upload(
        self, path: str, form: Mapping[str, str], file: Path, name: str
    ) -> bytes | Fault:
        """A file as multipart/form-data."""
        parts = [("file", (name, file.read_bytes(), "application/jsonl"))]
        options = {"headers": {"Content-Type": "multipart/form-data"}, **_STAY}
        return await self._bytes_of(
            self.sdk.post(
                path, cast_to=httpx.Response, body=dict(form), files=parts, options=options
            )
        )

    async def _bytes_of(self, call: Awaitable[Any]) -> bytes | Fault:
        try:
            content: bytes = (await call).content
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APIConnectionError as error:
            return self._no_connection(error)
        except openai.OpenAIError as error:
            return broken(f"the SDK can't read the reply ({type(error).__name__})")
        return content

    def _refusal(self, error: openai.APIStatusError) -> Fault:
        fault = read_reply(error.status_code, error.response.headers, _content(error))
        assert isinstance(fault, Fault), "the SDK raises for no other status"
        return self.clean(fault)

    def _too_late(self) -> Fault:
        return broken(f"no whole reply within {self._timeout_s:g} s", "timeout", "down")

    def _no_connection(self, error: openai.APIConnectionError) -> Fault:
        """Told by the causes: the SDK calls a refused connection a timeout when aiohttp made it.

        Only their kinds and the system's words are taken: messages may hold a proxy's password.
        """
        reason = ""
        cause: BaseException | None = error
        while cause is not None:
            # aiohttp's own has no words, and the one with words as its cause.
            words = getattr(cause, "verify_message", None)
            if isinstance(cause, ssl.SSLCertVerificationError) and words is not None:
                message = f"the server's certificate is not trusted ({words})"
                return Fault(error_type="certificate", message=message, remedy="stop")
            if isinstance(cause, TimeoutError):
                return self._too_late()
            if isinstance(cause, OSError) and cause.errno:
                # Below zero are those of name resolution, which have words of their own.
                reason = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
            reason = reason or type(cause.__cause__ or cause).__name__
            cause = cause.__cause__ or cause.__context__
        return broken(f"the connection failed: {reason}", "connection", "down")

    def clean(self, fault: Fault) -> Fault:
        """Without the key, should the server have repeated it."""
        return msgspec.structs.replace(fault, message=self.redact(fault.message))

    def redact(self, text: str) -> str:
        return self._key.redact(text) if self._key is not None else text

    async def close(self) -> None:
        await self.sdk.close()


def _content(error: openai.APIStatusError) -> bytes:
    try:
        content: bytes = error.response.content
    except Exception:  # a body that broke off; its status says enough
        return b""
    return content

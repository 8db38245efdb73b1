"""What an OpenAI-compatible server replied: an answer, or a fault and what it means for the run.

Pure: status, headers and body in, one verdict out. Faults are told apart by status, by the API's
own error code, type and parameter, never by the wording of a message. Nothing counts as an answer
that is not whole: valid JSON, a choice, a finish reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from ragfleet.engines.protocol import FinishReason
from ragfleet.remote.headers import retry_after_s

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

Remedy = Literal["fail", "retry", "stop", "adapt"]
Load = Literal["none", "limited", "down"]
"""What a fault says of the server: nothing, that it is asked too much, that it is not there."""

_TOO_LONG_CODES: Final = frozenset(
    {
        "context_length_exceeded",
        "string_above_max_length",
        "max_tokens_exceeded",
        "model_max_prompt_tokens_exceeded",
        "exceed_context_size_error",  # llama.cpp, as the type
    }
)
_TOO_LONG_PARAMS: Final = frozenset({"input_tokens"})  # vLLM
_FILTER_CODES: Final = frozenset(
    {"content_filter", "content_policy_violation", "data_inspection_failed"}  # DashScope's
)
_QUOTA_CODES: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_NAME_CODES: Final = frozenset({"unsupported_parameter", "unknown_parameter"})
_STOPPED: Final = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence"})
_CUT: Final = frozenset({"length", "max_tokens"})
_MESSAGE_LENGTH: Final = 400


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    finish_reason: FinishReason
    reasoning: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Embedded(Answer, frozen=True, kw_only=True):
    """Vectors, in the order of the texts."""

    vectors: list[list[float]]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """No answer.

    Attributes:
        error_type: one word for a failure row.
        remedy: fail this request, try it again, stop the run, or change the request's form.
        after_s: the least time to wait, as the server says.
    """

    error_type: str
    message: str
    remedy: Remedy
    load: Load = "none"
    after_s: float | None = None
    status: int | None = None


def read_reply(status: int, headers: Mapping[str, str], body: bytes) -> Answer | Fault:
    """`headers` by lower-case names (or a mapping that does not care)."""
    value = _whole(status, headers, body)
    if isinstance(value, Fault):
        return value
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return broken("the reply holds no choice")
    return _read_choice(choices[0], value.get("usage"))


def read_embeddings(status: int, headers: Mapping[str, str], body: bytes) -> Embedded | Fault:
    """Of the endpoint /embeddings; rows may come in any order."""
    value = _whole(status, headers, body)
    if isinstance(value, Fault):
        return value
    try:
        rows = msgspec.convert(value.get("data"), list[_Row])
    except msgspec.ValidationError:
        return broken("the reply holds no embeddings")
    rows.sort(key=lambda row: row.index)
    if not rows or len({len(row.embedding) for row in rows}) != 1:
        return broken("the reply's embeddings are not of one length")
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Embedded(
        text="",
        finish_reason="stop",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=0,
        vectors=[row.embedding for row in rows],
    )


class _Row(msgspec.Struct):
    index: int
    embedding: list[float]


def _whole(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any] | Fault:
    """The JSON object of a reply that reports no error."""
    if status >= 300:
        return _read_error(status, headers, body)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return broken("the reply is not whole: no valid JSON")
    if not isinstance(value, dict):
        return broken("the reply is no JSON object")
    error = value.get("error")
    if error:  # some gateways report an upstream error with status 200
        code = error.get("code") if isinstance(error, dict) else None
        inner = code if isinstance(code, int) and 400 <= code < 600 else 502
        return _read_error(inner, headers, body)
    return value


def broken(message: str, error_type: str = "bad_reply", load: Load = "none") -> Fault:
    """A fault of the transport or the server that may pass."""
    return Fault(error_type=error_type, message=message, remedy="retry", load=load)


def _read_choice(choice: Mapping[str, Any], usage: Any) -> Answer | Fault:
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        return _filtered("the server's content filter stopped the answer")
    if reason == "insufficient_system_resource":  # DeepSeek: interrupted, not finished
        return broken("the server ran out of resources", "overloaded", "limited")
    if reason not in _STOPPED and reason not in _CUT:
        if reason is None:
            return broken("the answer has no finish reason: it is not whole")
        return Fault(
            error_type="generation_error",
            message=f"the server ended the answer with finish_reason {str(reason)[:40]!r}",
            remedy="fail",
        )
    message = choice.get("message")
    if isinstance(message, dict):
        text = _text(message.get("content"))
        thought = message.get("reasoning_content") or message.get("reasoning")
        refusal = message.get("refusal")
        if not text and isinstance(refusal, str) and refusal:
            return _filtered(f"the model refused: {refusal[:_MESSAGE_LENGTH]}")
    else:
        text, thought = _text(choice.get("text")), None
    if text is None:
        if not thought and reason not in _CUT:
            return broken("the reply holds no text")
        text = ""
    reasoning = thought.strip() if isinstance(thought, str) and thought else None
    if reasoning is None:
        reasoning, text = split_thinking(text)
    usage = usage if isinstance(usage, dict) else {}
    return Answer(
        text=text,
        finish_reason="length" if reason in _CUT else "stop",
        reasoning=reasoning,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def split_thinking(text: str) -> tuple[str | None, str]:
    """(reasoning, answer). A template may have opened the thinking in the prompt, unseen here."""
    body = text.lstrip()
    if body.startswith(THINK_OPEN):
        body = body[len(THINK_OPEN) :]
    elif THINK_CLOSE not in text or THINK_OPEN in text:
        return None, text
    reasoning, _, answer = body.partition(THINK_CLOSE)
    return reasoning.strip(), answer.strip()


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # parts, as newer servers may send them
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _filtered(message: str) -> Fault:
    return Fault(error_type="content_filter", message=message, remedy="fail")


# ---- errors


def _read_error(status: int, headers: Mapping[str, str], body: bytes) -> Fault:
    if status < 400:
        # Without its query and its user, which may hold what is nobody's business.
        place = re.sub("//[^/]*@", "//", headers.get("location", "").partition("?")[0])
        message = f"HTTP {status}: it redirects to {place[:_MESSAGE_LENGTH] or 'nowhere'}"
        return Fault(error_type="redirected", message=message, remedy="stop", status=status)
    error = _error_object(body)
    codes = {str(error[name]) for name in ("code", "type") if error.get(name) is not None}
    param = error.get("param")
    message = f"HTTP {status}: {str(error.get('message') or 'no reason given')[:_MESSAGE_LENGTH]}"

    def fault(error_type: str, remedy: Remedy, load: Load = "none") -> Fault:
        return Fault(
            error_type=error_type,
            message=message,
            remedy=remedy,
            load=load,
            after_s=retry_after_s(headers) if remedy == "retry" else None,
            status=status,
        )

    if status in (400, 413, 422):
        if codes & _TOO_LONG_CODES or param in _TOO_LONG_PARAMS or status == 413:
            return fault("too_long", "fail")
        if codes & _FILTER_CODES:
            return fault("content_filter", "fail")
        if param == "max_tokens" and codes & _NAME_CODES:
            return fault("invalid_request", "adapt")
        if param in ("model", "base_url") or "model_not_found" in codes:
            return fault("no_such_model", "stop")
        return fault("invalid_request", "fail")
    if status in (401, 403):
        return fault("refused", "stop")
    if status == 402 or (status == 429 and codes & _QUOTA_CODES):
        return fault("quota", "stop")
    if status == 429:
        return fault("rate_limited", "retry", "limited")
    if status == 503:
        return fault("overloaded", "retry", "down")
    if status in (408, 504):
        return fault("timeout", "retry", "down")
    if status in (409, 425):
        return fault("conflict", "retry")
    if status >= 500:
        return fault("server_error", "retry", "down")
    return fault("no_such_model" if status == 404 else "refused", "stop")


def _error_object(body: bytes) -> dict[str, Any]:
    """The error as OpenAI has it: {"error": {message, type, param, code}}; others bend to it."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {"message": body[:200].decode("utf-8", "replace").strip()}
    if not isinstance(value, dict):
        return {"message": str(value)[:200]}
    error = value.get("error", value)
    if isinstance(error, dict):
        return error
    return {"message": str(error), "type": value.get("error_type")}

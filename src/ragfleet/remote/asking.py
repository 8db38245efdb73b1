"""A prepared request as the body of an API call.

Pure: messages and sampling in, JSON-ready values out. Shared by realtime calls, batch files and
`ragfleet export`.
"""

from __future__ import annotations

import urllib.parse
from typing import Any, Final, Literal

import msgspec

from ragfleet.engines.protocol import (
    Failure,
    Prepared,
    PromptSettings,
    Request,
    SamplingParams,
)
from ragfleet.errors import RemoteError
from ragfleet.prompts import PLAIN_STOP, RecordPromptError, build_messages, plain_prompt
from ragfleet.remote.replies import Fault
from ragfleet.remote.spec import RemoteSpec

LengthField = Literal["max_tokens", "max_completion_tokens"]
_SEED_BITS: Final = 31
"""Servers take seeds of 31 bits at least; a record's own has 64."""


class RemotePrepared(Prepared, frozen=True, kw_only=True):
    """A request with the part of its body that is its own."""

    own: dict[str, Any]
    num_bytes: int


def prepare(
    request: Request, settings: PromptSettings, spec: RemoteSpec
) -> RemotePrepared | Failure:
    """Render one request; the server's tokenizer decides later whether it fits."""
    try:
        messages = build_messages(
            settings, request.record, request.query, request.context, request.retrieval_method
        )
    except RecordPromptError as error:
        return Failure(key=request.key, error_type=error.error_type, error=str(error))
    num_bytes = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    own: dict[str, Any] = {"messages": messages}
    prompt = messages[-1]["content"]
    if spec.api_format == "completion":
        prompt = plain_prompt(messages)
        own = {"prompt": prompt}
    try:
        msgspec.json.encode(own)
    except UnicodeEncodeError:
        return Failure(
            key=request.key,
            error_type="invalid_record",
            error="the prompt holds a lone surrogate, which no request can carry",
        )
    if request.seed is not None:
        own["seed"] = request.seed % (1 << _SEED_BITS)
    return RemotePrepared(request=request, prompt=prompt, own=own, num_bytes=num_bytes)


def common_body(
    spec: RemoteSpec,
    settings: PromptSettings,
    sampling: SamplingParams,
    length_field: LengthField = "max_tokens",
) -> dict[str, Any]:
    """What all requests of a run have in common."""
    body: dict[str, Any] = {
        "model": spec.model,
        length_field: sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        body["top_p"] = sampling.top_p
    stop = [*sampling.stop, *(PLAIN_STOP if spec.api_format == "completion" else ())]
    if stop:
        body["stop"] = stop
    if settings.chat_template_kwargs:
        body["chat_template_kwargs"] = dict(settings.chat_template_kwargs)
    return {**body, **spec.extra_body}


def stop_error(spec: RemoteSpec, fault: Fault) -> RemoteError:
    """What ends the whole run, with what to set."""
    key = f"{spec.key_env} or --api_key_file"
    said = f"{spec.base_url}: {fault.message}"
    version = ""
    if not urllib.parse.urlsplit(spec.base_url).path:
        version = f" Most servers want {spec.base_url}/v1."
    advice = {
        "refused": f"The API does not let this run in. Check {key}, and --base_url.",
        "no_such_model": (
            f"Check the model's name (--api_model_name {spec.model}) and --base_url; for chat"
            f" models --api_format is chat.{version}"
        ),
        "redirected": (
            "Prompts are sent to no other address than the one named. If that is the right one,"
            " name it with --base_url."
        ),
        "quota": f"The account behind {key} has no credit or quota left.",
        "certificate": "Name a bundle with the issuer's certificate in SSL_CERT_FILE.",
    }
    return RemoteError(
        f"{said}\n{advice.get(fault.error_type, 'The run can not go on like this.')}"
    )

"""One record's prompt, exactly as a worker sends it: `ragfleet show`.

Loads a tokenizer and no model. A user's class is imported, because its `create_prompt` is code.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ragfleet.config import RunConfig
from ragfleet.engines.echo import EchoEngine
from ragfleet.engines.protocol import (
    Engine,
    EngineInfo,
    EngineSpec,
    Failure,
    Prepared,
    Request,
    SamplingParams,
)
from ragfleet.errors import InputError
from ragfleet.index import UTF8_BOM
from ragfleet.model_files import context_limit
from ragfleet.preparation import prepare
from ragfleet.records import Head, LazyRecord, parse_head
from ragfleet.remote.asking import RemotePrepared
from ragfleet.remote.asking import prepare as prepare_body


def rendered_prompt(config: RunConfig, identifier: str) -> tuple[str, str]:
    """The exact prompt of the record with this id (or `line:<n>`), and a line of facts about it.

    Raises:
        InputError: no such record, or it gets a failure row instead of a prompt.
        ConfigError: the user's class fails, or asks what only its own code knows.
    """
    preparation = prepare(config, os.environ, None, needs_seats=False)
    line, line_no = _find_line(config.contexts_file, identifier)
    if line.isspace():
        raise InputError(f"{identifier} is a blank line, which is no record and has no prompt.")
    head = parse_head(line)
    if not isinstance(head, Head):
        raise InputError(f"{identifier} (line {line_no}) is not sent: {head.reason}.")
    if head.error is not None:
        raise InputError(f"{identifier} (line {line_no}) is not sent: {head.error}.")
    request = Request(
        key=b"",
        query=head.query,
        context=head.context,
        retrieval_method=head.retrieval_method,
        record=LazyRecord(line),
    )
    spec = EngineSpec(
        model_dir=preparation.model_dir,
        sampling=SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        ),
        prompts=preparation.prompts,
        max_model_len=config.max_model_len,
        trust_remote_code=config.trust_remote_code,
        inference_type=config.inference_type,
        remote=preparation.remote,
    )
    prepared = _engine(spec, config.inference_class).prepare(request)
    if isinstance(prepared, Failure):
        raise InputError(
            f"{identifier} (line {line_no}) fails before it is sent:"
            f" {prepared.error_type}: {prepared.error}"
        )
    facts = f"line {line_no}"
    if preparation.model_dir is not None:
        facts += f": {len(prepared.token_ids):,} tokens"
    elif preparation.remote is None:
        facts += ": this engine sees the query alone"
    if prepared.truncated_tokens:
        facts += f", {prepared.truncated_tokens:,} of the context cut"
    return prepared.prompt, facts


def _engine(spec: EngineSpec, inference_class: str | None) -> Engine:
    """Prepares requests as the run's engine does; a user's class is around it."""
    if inference_class is None:
        inner = _prompts_only(spec)
        inner.start()
        return inner
    from ragfleet.engines.query_engines import PromptEngine, make_query_based

    engine = make_query_based(spec, inference_class, "show", _prompts_only)
    if not isinstance(engine, PromptEngine):
        raise InputError(
            f"{inference_class} has a generate_answer of its own, which decides while it runs what"
            " is asked; only the prompts of create_prompt can be shown."
        )
    engine.start()
    return engine


def _prompts_only(spec: EngineSpec) -> Engine:
    return EchoEngine(spec) if spec.model_dir is None and spec.remote is None else _Prompts(spec)


class _Prompts(EchoEngine):
    """Makes prompts as the local engines and the remote one do, and answers nothing."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._spec = spec

    def start(self) -> EngineInfo:
        from ragfleet.tokens import load_tokenizer

        spec = self._spec
        if spec.model_dir is None:
            return EngineInfo(name="prompts", max_model_len=None)
        self._tokenizer = load_tokenizer(spec.model_dir, spec.trust_remote_code)
        limit = spec.max_model_len or context_limit(spec.model_dir)
        return EngineInfo(name="prompts", max_model_len=limit)

    def prepare(self, request: Request) -> Prepared | Failure:
        from ragfleet.tokens import prepare_prompt

        spec = self._spec
        if spec.remote is not None:
            prepared = prepare_body(request, spec.prompts, spec.remote)
            return prepared if isinstance(prepared, Failure) else _with_messages(prepared)
        assert spec.model_dir is not None
        limit = spec.max_model_len or context_limit(spec.model_dir)
        return prepare_prompt(request, spec.prompts, self._tokenizer, spec.sampling, limit)


def _with_messages(prepared: RemotePrepared) -> Prepared:
    """What is sent to an API as text: its body's messages, whose template the server applies."""
    import msgspec

    if "prompt" in prepared.own:
        return prepared
    messages = prepared.own["messages"]
    text = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    return msgspec.structs.replace(prepared, prompt=text)


def _find_line(path: Path, identifier: str) -> tuple[bytes, int]:
    with contextlib.suppress(UnicodeError):  # as a locale of ASCII gives what is UTF-8
        identifier = identifier.encode(errors="surrogateescape").decode()
    wanted = identifier.encode(errors="surrogatepass")  # an argument that is not UTF-8
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(UTF8_BOM)  # noqa: PLW2901
                if identifier == f"line:{number}":
                    return line, number
                if wanted in line or not line.isascii() or b"\\u" in line:
                    head = parse_head(line)
                    if head.id is not None and str(head.id) == identifier:
                        return line, number
    except OSError as error:
        raise InputError(f"Can't read {path}: {error.strerror}.") from None
    raise InputError(f"{path} has no record {identifier} (ids are exact; line:<n> works too).")

"""Records to chat messages, and messages to plain text.

Owns the built-in wording, users' Jinja2 templates for the user message, and the plain form for
models without a chat template. Knows nothing of tokenizers, chat templates, models or files.

Jinja2 is imported only when a template is used: the built-in prompt is three f-strings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragfleet.engines.protocol import PromptSettings
from ragfleet.errors import ConfigError

if TYPE_CHECKING:
    import jinja2

DEFAULT_SYSTEM_PROMPT = (
    "You answer questions about programming interfaces from the documentation given."
    " If the answer is not in the documentation, say so."
)
HEADINGS: Mapping[str | None, str] = {
    "exact_api_match": "Documentation of the API asked about:",
    "rag_string_match": "Documentation matched by name:",
    "rag_fallback": "Documentation retrieved for the question:",
}
DEFAULT_HEADING = "Documentation:"
PLAIN_STOP = ("\nQuestion:",)
"""A base model goes on inventing questions: a plain prompt's answer ends where the next begins."""

Message = dict[str, str]


class RecordPromptError(ValueError):
    """A prompt cannot be made for one record; `error_type` is what its failure row says."""

    def __init__(self, message: str, error_type: str = "invalid_record") -> None:
        super().__init__(message)
        self.error_type = error_type


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomPrompts(PromptSettings):
    """Settings whose user message is made by code: a subclass's `create_prompt`."""

    user_message: Callable[[Mapping[str, Any], str, str, str | None], str]
    """(record, query, context, retrieval_method) to text. Raises RecordPromptError."""


def user_message(query: str, context: str, retrieval_method: str | None) -> str:
    """The built-in user message; the question comes last, so that equal contexts share a prefix."""
    heading = HEADINGS.get(retrieval_method, DEFAULT_HEADING)
    return f"{heading}\n\n{context}\n\nQuestion: {query}"


def build_messages(
    settings: PromptSettings,
    record: Mapping[str, Any],
    query: str,
    context: str,
    retrieval_method: str | None,
) -> list[Message]:
    """System (unless empty) and user message of one request.

    `query`, `context` and `retrieval_method` win over the record's own fields, so that a trimmed or
    replaced context reaches the template too. Raises RecordPromptError.
    """
    if isinstance(settings, CustomPrompts):
        user = settings.user_message(record, query, context, retrieval_method)
    elif settings.template is None:
        user = user_message(query, context, retrieval_method)
    else:
        user = render_template(settings.template, record, query, context, retrieval_method)
    return with_system(settings.system_prompt, user)


def with_system(system_prompt: str, user: str) -> list[Message]:
    """The two messages; an empty system prompt leaves the first one out."""
    if not system_prompt:
        return [{"role": "user", "content": user}]
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": user},
    ]


def plain_prompt(messages: Sequence[Message]) -> str:
    """Text for a model without a chat template; `PLAIN_STOP` ends its answer."""
    return "\n\n".join(message["content"] for message in messages) + "\nAnswer:"


# ---- users' templates -------------------------------------------------------------------------


def read_template(path: Path | None) -> tuple[str | None, frozenset[str] | None]:
    """Source of a prompt template and the record fields it names."""
    if path is None:
        return None, frozenset()
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--prompt_template {path} can't be read: {reason}.") from None
    check_template(source, str(path))
    fields = template_fields(source)
    known = {"query", "context", "retrieval_method"}
    return source, None if fields is None else fields - known


def check_template(source: str, name: str) -> None:
    """Raises ConfigError with `name:line` where a template is not valid or needs other files."""
    import jinja2

    try:
        ast = _environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{name}:{error.lineno}: the prompt template is not valid Jinja2: {error.message}"
        ) from None
    files = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport)
    for node in ast.find_all((*files, jinja2.nodes.Extends)):
        raise ConfigError(
            f"{name}:{node.lineno}: a prompt template cannot include, import or extend other files;"
            " put everything into this one."
        )
    try:
        _compiled(source)
    except jinja2.TemplateError as error:  # unknown filters and tests are found only by compiling
        line = getattr(error, "lineno", 1)
        raise ConfigError(f"{name}:{line}: the prompt template is not valid: {error}") from None


def template_fields(source: str) -> frozenset[str] | None:
    """The record fields that a template names; None where it uses `record` and so may use any.

    Names that Jinja2 itself provides (`range`, `namespace`, …) are not fields: they win over a
    field of the same name, which is then reached as `record.range`. Raises ConfigError.
    """
    import jinja2.meta

    check_template(source, "prompt template")
    environment = _environment()
    names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    if "record" in names:
        return None
    return frozenset(names - environment.globals.keys())


def render_template(
    source: str,
    record: Mapping[str, Any],
    query: str,
    context: str,
    retrieval_method: str | None,
) -> str:
    """One user message. Raises RecordPromptError whatever goes wrong with this record."""
    import jinja2

    fields = {
        **record,
        "query": query,
        "context": context,
        "retrieval_method": retrieval_method,
    }
    visible = {name: value for name, value in fields.items() if name not in _environment().globals}
    try:
        return _compiled(source).render({**visible, "record": fields})
    except jinja2.UndefinedError as error:
        raise RecordPromptError(
            f"the prompt template uses a field that this record lacks: {error.message}"
            f" (it has: {', '.join(sorted(fields))})."
            " Use {% if field is defined %} or the default filter in the template."
        ) from None
    except Exception as error:  # a template is code: it can raise anything, for this record alone
        raise RecordPromptError(
            f"the prompt template failed for this record: {type(error).__name__}: {error}"
        ) from error


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # trim_blocks and lstrip_blocks as in chat templates: a line of only {% … %} leaves nothing.
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)

"""Messages, users' templates and the plain form."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ragfleet.engines.protocol import PromptSettings
from ragfleet.errors import ConfigError
from ragfleet.prompts import (
    DEFAULT_SYSTEM_PROMPT,
    CustomPrompts,
    RecordPromptError,
    build_messages,
    check_template,
    plain_prompt,
    template_fields,
)

RECORD = {"id": "a", "query": "How?", "context": "Docs.", "target_api": "numpy.sort", "range": 7}


def settings(template: str | None = None, system: str = DEFAULT_SYSTEM_PROMPT) -> PromptSettings:
    return PromptSettings(system_prompt=system, template=template)


def user_text(template: str | None = None, method: str | None = None, **record: object) -> str:
    messages = build_messages(settings(template), {**RECORD, **record}, "How?", "Docs.", method)
    assert messages[0] == {"role": "system", "content": DEFAULT_SYSTEM_PROMPT}
    assert messages[1]["role"] == "user"
    return messages[1]["content"]


@pytest.mark.parametrize(
    ("method", "heading"),
    [
        ("exact_api_match", "Documentation of the API asked about:"),
        ("rag_string_match", "Documentation matched by name:"),
        ("rag_fallback", "Documentation retrieved for the question:"),
        ("something new", "Documentation:"),
        (None, "Documentation:"),
    ],
)
def test_the_heading_depends_on_the_retrieval_method(method: str | None, heading: str) -> None:
    assert user_text(method=method) == f"{heading}\n\nDocs.\n\nQuestion: How?"


def test_an_empty_system_prompt_leaves_the_message_out() -> None:
    messages = build_messages(settings(system=""), RECORD, "q", "c", None)
    assert [message["role"] for message in messages] == ["user"]
    assert plain_prompt(messages) == "Documentation:\n\nc\n\nQuestion: q\nAnswer:"


def test_the_plain_form() -> None:
    messages = build_messages(settings(system="Be brief."), RECORD, "q", "c", None)
    assert plain_prompt(messages) == "Be brief.\n\nDocumentation:\n\nc\n\nQuestion: q\nAnswer:"


def test_templates_see_every_field_and_the_record() -> None:
    template = (
        "{% if target_api is defined %}\n{{ target_api }}\n{% endif %}\n"
        "{{ query }} {{ record.id }} {{ record['range'] }} {{ range(2) | list }}\n"
    )
    assert user_text(template) == "numpy.sort\nHow? a 7 [0, 1]"


def test_a_replaced_context_wins_over_the_record_in_templates() -> None:
    template = "{{ context }}/{{ record.context }}/{{ query }}"
    messages = build_messages(settings(template), RECORD, "new q", "new c", None)
    assert messages[1]["content"] == "new c/new c/new q"


def test_a_field_that_a_record_lacks_is_named() -> None:
    with pytest.raises(RecordPromptError, match=r"'missing' is undefined.*it has: .*target_api"):
        user_text("{{ missing }}")
    with pytest.raises(RecordPromptError, match="no attribute 'other'"):
        user_text("{{ record.other }}")


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ query + 1 }}", "{{ ''.__class__.__mro__ }}"]
)
def test_whatever_a_template_does_is_the_records_error(template: str) -> None:
    with pytest.raises(RecordPromptError, match="the prompt template"):
        user_text(template)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fine\n{% if %}", r"my\.j2:2: .*not valid"),
        ("{{ query | no_such_filter }}", r"my\.j2:1: .*no_such_filter"),
        ("\n\n{% include 'other.j2' %}", r"my\.j2:3: .*cannot include"),
    ],
)
def test_bad_templates_are_told_with_their_line(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_template(source, "my.j2")


def test_template_fields() -> None:
    source = (
        "{% for x in items %}{{ x }}{% endfor %}{{ query }}{{ range(3) }}{% set y = 1 %}{{ y }}"
    )
    assert template_fields(source) == {"items", "query"}
    assert template_fields("no fields") == frozenset()
    assert template_fields("{{ record.query }}") is None


def test_custom_prompts_call_their_function() -> None:
    custom = CustomPrompts(
        system_prompt="s",
        template="{{ ignored }}",
        user_message=lambda record, query, context, method: (
            f"{record['id']}{query}{context}{method}"
        ),
    )
    assert build_messages(custom, RECORD, "q", "c", "m")[1]["content"] == "aqcm"


def test_the_default_prompt_needs_no_jinja() -> None:
    code = (
        "import sys, ragfleet.prompts as p\n"
        "from ragfleet.engines.protocol import PromptSettings\n"
        "p.build_messages(PromptSettings(system_prompt='s'), {}, 'q', 'c', None)\n"
        "assert 'jinja2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

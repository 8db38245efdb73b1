"""The two formats: what is a record, what a result looks like, and which records share a key."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ragfleet.nesting import MAX_DEPTH, is_too_deep
from ragfleet.records import (
    INPUT_FIELDS,
    Head,
    InvalidRecord,
    Keyer,
    LazyRecord,
    decode_object,
    normalise_json,
    parse_fields,
    parse_head,
    parse_sent,
    repeat_key,
)
from ragfleet.rows import (
    OUTPUT_FIELDS,
    OWN_FIELDS,
    Answered,
    encode_value,
    failed,
    from_shard,
    parse_shard_row,
    result_row,
)

RUN_KEY = bytes(range(16))
FULL = {
    "success": True,
    "context": "the context",
    "query": "how?",
    "id": "r1",
    "extra_b": {"nested": [1, 2]},
    "retrieval_method": "exact",
    "target_api": "numpy.sum",
    "dependencies": ["numpy==1.16.6"],
    "dedup_key": "d",
    "query_index": 3,
    "original_item_id": "o1",
    "context_length": 11,
    "retrieval_time": 0.25,
    "extra_a": None,
}
"""Every documented field, in an order of its own, and two that pass through."""

ANSWERED = Answered(
    b'"an answer"',
    0.5,
    2,
    True,
    (("finish_reason", b'"stop"'), ("prompt_tokens", b"7"), ("completion_tokens", b"2")),
)


def as_line(record: object, **options: Any) -> bytes:
    return json.dumps(record, **{"ensure_ascii": False, **options}).encode()


def row_of(record: dict[str, Any] | bytes, answered: Answered = ANSWERED, **options: Any) -> bytes:
    line = record if isinstance(record, bytes) else as_line(record)
    return result_row(parse_fields(line), "line:9", answered, **options)


def head_of(line: bytes) -> Head:
    head = parse_head(line)
    assert isinstance(head, Head), head
    return head


def key_of(
    line: bytes,
    fields: tuple[str, ...] | None = (),
    distinct: bool = False,
    run_key: bytes = RUN_KEY,
) -> bytes:
    return Keyer(run_key, fields, distinct).key(head_of(line), line)


# ---- rows


def test_a_result_has_the_documented_keys_in_order_then_what_passes_through_then_ours() -> None:
    row = row_of(FULL)
    assert row.endswith(b"}\n")
    assert row.count(b"\n") == 1
    assert list(json.loads(row)) == [
        *OUTPUT_FIELDS,
        "extra_b",
        "extra_a",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
    ]
    assert (
        *("id", "original_item_id", "query_index", "dedup_key", "query", "target_api"),
        *("dependencies", "retrieval_method", "context_length", "answer", "retrieval_time"),
        *("inference_time", "total_time", "worker_rank", "success"),
    ) == OUTPUT_FIELDS


def test_a_result_says_what_the_record_and_the_answer_say() -> None:
    result = json.loads(row_of(FULL))
    copied = ("id", "original_item_id", "query_index", "dedup_key", "query", "target_api")
    for name in (*copied, "dependencies", "retrieval_method", "context_length", "extra_a"):
        assert result[name] == FULL[name]
    assert result["answer"] == "an answer"
    assert result["retrieval_time"] == 0.25
    assert result["inference_time"] == 0.5
    assert result["total_time"] == 0.75
    assert result["worker_rank"] == 2
    assert result["success"] is True
    assert "context" not in result


def test_a_failure_row_has_every_documented_key() -> None:
    result = json.loads(row_of({"query": "q", "context": "c"}, failed("too_long", "9 > 8")))
    assert tuple(result) == (
        *OUTPUT_FIELDS,
        *("finish_reason", "prompt_tokens", "completion_tokens", "error", "error_type"),
    )
    assert result["id"] == "line:9"
    assert result["answer"] is None
    assert result["inference_time"] == 0.0
    assert result["worker_rank"] is None
    assert result["success"] is False
    assert result["error"] == "9 > 8"
    assert result["error_type"] == "too_long"


def test_a_line_that_could_not_be_read_still_gets_a_full_row() -> None:
    result = json.loads(result_row(None, "line:4", failed("invalid_record", "not UTF-8")))
    assert result["id"] == "line:4"
    assert tuple(result)[: len(OUTPUT_FIELDS)] == OUTPUT_FIELDS
    told = {"id", "retrieval_time", "inference_time", "total_time", "success"}
    assert all(result[name] is None for name in OUTPUT_FIELDS if name not in told)


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_chinese_is_written_as_such_even_if_it_came_as_escapes(ensure_ascii: bool) -> None:
    record = {"id": "甲", "query": "怎么用?", "context": "文档", "标签": {"键": "值😀"}}
    line = as_line(record, ensure_ascii=ensure_ascii)
    assert (b"\\u" in line) == ensure_ascii
    answered = Answered('"答案"'.encode(), 0.1, 0, True, ANSWERED.own)
    row = row_of(line, answered, include_context=True)
    assert b"\\u" not in row
    for text in ("甲", "怎么用?", "文档", "标签", "键", "值😀", "答案"):
        assert text.encode() in row


def test_an_escaped_backslash_before_a_u_survives() -> None:
    record = {"query": r"what is \u0041?", "context": "c", "path": "C:\\users"}
    result = json.loads(row_of(record))
    assert result["query"] == r"what is \u0041?"
    assert result["path"] == "C:\\users"


def test_control_characters_stay_escaped() -> None:
    row = row_of({"query": "a\x00b\nc\x1b[0m", "context": "c", "x": "\x01"})
    assert row.count(b"\n") == 1
    assert json.loads(row)["query"] == "a\x00b\nc\x1b[0m"
    assert json.loads(row)["x"] == "\x01"


def test_include_context_repeats_it_before_the_other_fields_that_pass_through() -> None:
    names = list(json.loads(row_of(FULL, include_context=True)))
    assert names[len(OUTPUT_FIELDS)] == "context"
    assert json.loads(row_of(FULL, include_context=True))["context"] == "the context"


def test_fields_named_like_ours_never_stand_twice() -> None:
    ours = {name: "theirs" for name in (*OUTPUT_FIELDS, *OWN_FIELDS) if name not in INPUT_FIELDS}
    row = row_of({"query": "q", "context": "c", **ours, "kept": 1})
    pairs = json.loads(row, object_pairs_hook=list)
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names))
    assert "theirs" not in row.decode()
    assert ("kept", 1) in pairs


def test_fields_named_like_the_shards_bookkeeping_can_not_spoil_a_shard_line() -> None:
    line = as_line({"query": "q", "context": "c", "request_key": 5, "finished_at_ns": "late"})
    extra = b',"request_key":"%b","finished_at_ns":12' % (b"0" * 32)
    shard_row = row_of(line, extra=extra)
    assert parse_shard_row(shard_row).request_key == "0" * 32
    assert parse_shard_row(shard_row).finished_at_ns == 12
    assert json.loads(row_of(line))["request_key"] == 5, "in the output they are the record's own"


@pytest.mark.parametrize(
    "value", ["1e400", "-1e400", "1" * 40, "1" * 5000, "1.00", "1E5", "[1e999]", '{"a":1e400}']
)
def test_numbers_that_pass_through_stay_as_they_were_written(value: str) -> None:
    line = b'{"query":"q","context":"c","n":%b}' % value.encode()
    head_of(line)
    assert b'"n":' + value.encode() + b"," in row_of(line)
    escaped = line.replace(b'"q"', b'"\\u6587"')
    assert "文".encode() in row_of(escaped), "and do not keep escapes elsewhere"
    if "e" in value or len(value) > 99:
        assert b'"n":' + value.encode() + b"," in row_of(escaped)
    decoded = LazyRecord(line)
    assert decoded["query"] == "q"
    assert set(decoded) == {"query", "context", "n"}
    assert decode_object(row_of(line))["id"] == "line:9"


@pytest.mark.parametrize(
    "value",
    ["1e400", "1e308", "1" * 400, "-1", "-0.0", "-1e400", '"soon"', "null", "true", "[1]"],
)
def test_a_senseless_retrieval_time_counts_as_none(value: str) -> None:
    line = b'{"query":"q","context":"c","retrieval_time":%b}' % value.encode()
    result = json.loads(row_of(line))
    assert result["retrieval_time"] == 0.0
    assert result["total_time"] == 0.5


@pytest.mark.parametrize(("given_id", "expected"), [(None, "line:9"), (7, 7), ("", ""), ("x", "x")])
def test_a_record_without_an_id_is_called_by_its_line(given_id: Any, expected: Any) -> None:
    assert json.loads(row_of({"id": given_id, "query": "q", "context": "c"}))["id"] == expected


def test_the_length_of_a_context_is_told_where_the_record_does_not() -> None:
    result = json.loads(row_of({"query": "q", "context": "abc"}, context_length=3))
    assert result["context_length"] == 3
    result = json.loads(row_of({"query": "q", "context_length": 8}, context_length=3))
    assert result["context_length"] == 8


def test_a_shards_line_gives_back_its_answer() -> None:
    own = (*ANSWERED.own, ("reasoning", b'"hm"'), ("truncated_tokens", b"3"))
    answered = Answered(b'"a"', 1.5, 0, True, own)
    extra = b',"request_key":"%b","finished_at_ns":1' % (b"a" * 32)
    assert from_shard(parse_shard_row(row_of(FULL, answered, extra=extra))) == answered
    failure = failed("oom", "no room", 3)
    assert from_shard(parse_shard_row(row_of(FULL, failure, extra=extra))) == failure


def test_lone_surrogates_of_a_model_become_replacement_characters() -> None:
    assert json.loads(encode_value("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"
    assert json.loads(encode_value("\ud83d\ude00")) == "😀"
    assert encode_value("好") == '"好"'.encode()


# ---- what is a record


# Its bytes look like a text that is never closed, so brackets don't count.
UTF_16 = '{"x":"\u2200","y":' + "[" * 10**5
INVALID: dict[str, tuple[bytes, Any, str]] = {
    "empty object": (b"{}", None, "`query` is missing or null"),
    "no context": (b'{"id":"a","query":"q"}', "a", "`context` is missing or null"),
    "null query": (b'{"id":"a","query":null,"context":"c"}', "a", "`query` is missing or null"),
    "blank query": (b'{"id":"a","query":" \\n\\t","context":"c"}', "a", "`query` is blank"),
    "empty query": (b'{"id":1,"query":"","context":"c"}', 1, "`query` is blank"),
    "ideographic space": ('{"query":"\u3000","context":"c"}'.encode(), None, "`query` is blank"),
    "query a number": (b'{"id":"a","query":1,"context":"c"}', "a", "`query` is a number"),
    "query a list": (b'{"id":"a","query":["q"],"context":"c"}', "a", "`query` is a list"),
    "context an object": (b'{"id":"a","query":"q","context":{}}', "a", "`context` is an object"),
    "context a boolean": (b'{"id":"a","query":"q","context":true}', "a", "`context` is a boolean"),
    "id a list": (b'{"id":[1],"query":"q","context":"c"}', None, "`id` is a list"),
    "id a fraction": (b'{"id":1.5,"query":"q","context":"c"}', None, "`id` is a number"),
    "id a boolean": (b'{"id":true,"query":"q","context":"c"}', None, "`id` is a boolean"),
    "method a number": (
        b'{"id":"a","query":"q","context":"c","retrieval_method":2}',
        "a",
        "`retrieval_method` is a number",
    ),
    "success a string": (
        b'{"id":"a","query":"q","context":"c","success":"yes"}',
        "a",
        "`success` is a string",
    ),
    "success a number": (
        b'{"id":"a","query":"q","context":"c","success":1}',
        "a",
        "`success` is a number",
    ),
    "an array": (b"[1, 2]", None, "not a JSON object"),
    "a number": (b"12", None, "not a JSON object"),
    "a string": (b'"text"', None, "not a JSON object"),
    "null": (b"null", None, "not a JSON object"),
    "cut": (b'{"query":"q","context":"c', None, "not valid JSON"),
    "two objects": (b'{"query":"q","context":"c"}{"a":1}', None, "not valid JSON"),
    "trailing comma": (b'{"query":"q","context":"c"},', None, "not valid JSON"),
    "plain text": (b"hello", None, "not valid JSON"),
    "NaN": (b'{"query":"q","context":"c","x": NaN}', None, "no NaN: write null"),
    "Infinity": (b'{"query":"q","context":"c","x":-Infinity}', None, "no -Infinity: write null"),
    "lone high surrogate": (b'{"query":"\\ud800","context":"c"}', None, "not valid JSON"),
    "lone low surrogate": (b'{"query":"q","context":"\\udc00"}', None, "not valid JSON"),
    "surrogate unread": (b'{"query":"q","context":"c","x":"\\ud800x"}', None, "not valid JSON"),
    "raw newline byte": (b'{"query":"a\x01b","context":"c"}', None, "not valid JSON"),
    "GBK": ('{"query":"怎么","context":"c"}'.encode("gbk"), None, "not UTF-8"),
    "GBK unread": ('{"query":"q","context":"c","x":"怎"}'.encode("gbk"), None, "not UTF-8"),
    "UTF-8 surrogates": (b'{"query":"\xed\xa0\x80","context":"c"}', None, "not UTF-8"),
    "deep": (b'{"query":"q","context":"c","x":' + b"[" * 10**5 + b"]" * 10**5 + b"}", None, "deep"),
    "deep cut": (b'{"query":' + b"[" * 10**5, None, "nested more than 200 deep"),
    "deep GBK": ('{"query":"怎么","x":'.encode("gbk") + b"[" * 10**5, None, "not UTF-8"),
    "deep UTF-16": (
        ('{"x":"\u2200","y":' + "[" * 10**5).encode("utf-16-le"),
        None,
        "not valid JSON",
    ),
    "NULs": (b"\x00\x00\x00", None, "not valid JSON"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_lines_say_why_and_get_a_row(name: str) -> None:
    line, identifier, reason = INVALID[name]
    found = parse_head(line)
    assert isinstance(found, InvalidRecord)
    assert found.id == identifier
    assert reason in found.reason
    assert found.undecodable == (reason == "not UTF-8")
    if found.undecodable:
        with pytest.raises(UnicodeDecodeError) as of_the_line:
            line.decode()
        assert f"(byte {of_the_line.value.start} of the line)" in found.reason


@pytest.mark.parametrize("name", ["query", "context", "id", "retrieval_method", "success"])
def test_every_wrong_type_is_told_by_its_name(name: str) -> None:
    names = {"a list": "[]", "an object": "{}", "a number": "1.5", "a boolean": "true"}
    if name not in ("query", "context", "retrieval_method", "id"):
        names = {"a list": "[]", "an object": "{}", "a number": "0", "a string": '"true"'}
    for kind, value in names.items():
        fields = {"query": '"q"', "context": '"c"', name: value}
        line = "{" + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}"
        found = parse_head(line.encode())
        assert isinstance(found, InvalidRecord)
        assert f"`{name}` is {kind}" in found.reason


def test_only_query_and_context_are_needed_and_null_means_missing() -> None:
    head = head_of(b'{"query":"q","context":""}')
    assert head == Head(None, "q", "", None, None)
    line = b'{"id":null,"query":"q","context":"c","retrieval_method":null,"success":null}'
    assert head_of(line) == Head(None, "q", "c", None, None)


def test_a_failed_context_carries_its_error() -> None:
    head = head_of(b'{"id":1,"query":"","context":null,"success":false,"error":"no such API"}')
    assert head.error is not None
    assert "no such API" in head.error
    assert head.context == ""
    for error in (b"", b',"error":null', b',"error":""', b',"error":[1]'):
        line = b'{"query":"q","context":"c","success":false%b}' % error
        assert "no reason given" in (head_of(line).error or "")


def test_a_line_end_is_no_part_of_a_record() -> None:
    for end in (b"", b"\n", b"\r\n", b"  \n"):
        assert head_of(b'{"query":"q","context":"c"}' + end).query == "q"


def test_what_is_sent_is_what_was_checked() -> None:
    for method in ("exact", "", None):
        line = as_line({**FULL, "query": "问\u2028", "retrieval_method": method})
        head = head_of(line)
        fields, query, context, found = parse_sent(line)
        assert (query, context, found) == (head.query, head.context, head.retrieval_method)
        assert set(fields) == set(FULL)
    assert parse_sent(b'{"query":"q","context":"c"}')[3] is None


def test_the_last_of_two_equal_names_counts_everywhere() -> None:
    line = b'{"query":"first","query":"second","context":"c","x":1,"x":2}'
    assert head_of(line).query == "second"
    assert parse_sent(line)[1] == "second"
    assert json.loads(row_of(line))["query"] == "second"
    assert json.loads(row_of(line))["x"] == 2


def nested(depth: int, brackets: bytes = b"[]") -> bytes:
    opening, closing = (b'{"a":', b"}") if brackets == b"{}" else (b"[", b"]")
    return opening * depth + b"1" + closing * depth


def called_deep(depth: int, function: Callable[[bytes], Any], line: bytes) -> Any:
    """What a function returns where that much of the stack is in use."""
    return function(line) if depth == 0 else called_deep(depth - 1, function, line)


@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
@pytest.mark.parametrize("stack", [0, 500])
def test_how_deep_a_record_may_be_does_not_depend_on_who_reads_it(
    brackets: bytes, stack: int
) -> None:
    for depth in (199, 200, 201, 500, 900, 970, 985, 990, 1000, 10_000):
        line = b'{"query":"\\u6587","context":"c","x":%b}' % nested(depth, brackets)
        found = called_deep(stack, parse_head, line)
        if depth < MAX_DEPTH:
            assert isinstance(found, Head)
            assert nested(depth, brackets) in called_deep(stack, row_of, line)
            assert len(key_of(line, ("x",))) == 16
            assert called_deep(stack, decode_object, line)["query"] == "文"
        else:
            assert isinstance(found, InvalidRecord)
            assert found.reason == "nested more than 200 deep"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"context":"%b","x":%b}' % (b"[" * 999, nested(199)), False),
        (b'{"context":"%b","x":%b}' % (b"[" * 999, nested(200)), True),
        (b'{"x":%b,"x":1}' % nested(200), True),
        (b'{"x":[%b]}' % b",".join([nested(100)] * 9), False),
        (b'{"x":["%b\\""]}' % (b"{" * 999), False),
        (b'{"x":["\\"%b' % (b"{" * 999), False),  # a string that never ends
        (b'{"x":[1}%b' % (b"{" * 999), True),
        (b'{"\\u0078":[%b]%b}' % (b'"["' + b',"["' * 300, b" " * 900), False),
    ],
)
def test_only_brackets_outside_of_strings_nest(line: bytes, expected: bool) -> None:
    assert is_too_deep(line) == expected


# ---- keys

texts = st.text(st.characters(codec="utf-8"), max_size=12)
queries = texts.filter(lambda text: bool(text.strip()))
methods = st.none() | texts
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    leaves.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def record(query: str, context: str, method: str | None, **others: Any) -> bytes:
    return as_line({"query": query, "context": context, "retrieval_method": method, **others})


@given(queries, texts, methods, queries, texts, methods)
@settings(max_examples=150)
def test_different_questions_never_share_a_key(
    query: str, context: str, method: str | None, query2: str, context2: str, method2: str | None
) -> None:
    assume((query, context, method) != (query2, context2, method2))
    assert key_of(record(query, context, method)) != key_of(record(query2, context2, method2))


@given(queries, st.integers(0, 40), st.integers(0, 40))
def test_text_can_not_be_shifted_from_one_part_to_the_next(text: str, i: int, j: int) -> None:
    i, j = sorted((min(i, len(text)), min(j, len(text))))
    shifted = {
        (query, context, method)
        for query, context, method in (
            (text, "", ""),
            (text[:j] or "x", text[j:], ""),
            (text[:i] or "x", text[i:j], text[j:]),
            (text[:i] or "x", text[i:], None),
            (text[:i] or "x", text[i:], ""),
            (text[:i] or "x", text[i:] + "-", None),
            (text[:i] or "x", text[i:] + "=", ""),
        )
        if query.strip()
    }
    assert len({key_of(record(*parts)) for parts in shifted}) == len(shifted)


@given(queries, texts, methods, st.randoms(use_true_random=False), values)
def test_spelling_never_changes_a_key(
    query: str, context: str, method: str | None, random: Any, value: Any
) -> None:
    fields = {"id": "a", "query": query, "context": context, "x": value, "success": True}
    if method is not None:
        fields["retrieval_method"] = method
    plain = as_line(fields)
    names = list(fields)
    random.shuffle(names)
    spelt = as_line(
        {name: fields[name] for name in names}, ensure_ascii=True, indent=1, separators=(" ,", ": ")
    ).replace(b"\n", b" ")
    for asked in ((), ("x",), None):
        assert key_of(plain, asked) == key_of(spelt, asked)
    if method is None:
        fields["retrieval_method"] = None
        assert key_of(plain) == key_of(as_line(fields))


def test_other_fields_count_only_if_the_template_names_them() -> None:
    one, other = record("q", "c", None, api="a", tag=1), record("q", "c", None, api="b", tag=1)
    assert key_of(one) == key_of(other)
    assert key_of(one, ("tag",)) == key_of(other, ("tag",))
    assert key_of(one, ("api",)) != key_of(other, ("api",))
    assert key_of(one, None) != key_of(other, None)
    assert key_of(one, ("api", "tag")) == key_of(one, ("tag", "api"))


@given(values, values)
def test_a_named_field_is_told_from_any_other_value(value: Any, value2: Any) -> None:
    assume(json.dumps(value, sort_keys=True) != json.dumps(value2, sort_keys=True))
    assume(value != value2)
    one, other = record("q", "c", None, x=value), record("q", "c", None, x=value2)
    assert key_of(one, ("x",)) != key_of(other, ("x",))


def test_missing_null_and_empty_are_three_values() -> None:
    lines = [
        record("q", "c", None),
        record("q", "c", None, x=None),
        record("q", "c", None, x=""),
        record("q", "c", None, x=[]),
    ]
    assert len({key_of(line, ("x",)) for line in lines}) == 4
    assert key_of(lines[0], ("x",)) != key_of(lines[0], ("y",)), "names count too"


@given(texts, texts, values)
@example("a", "b", 1)
def test_a_value_can_not_move_to_another_field(name: str, name2: str, value: Any) -> None:
    taken = {"query", "context", "retrieval_method", "id", "success", "error"}
    assume(name != name2 and not {name, name2} & taken)
    names = (name, name2)
    one = record("q", "c", None, **{name: value})
    other = record("q", "c", None, **{name2: value})
    assert key_of(one, names) != key_of(other, names)


def test_what_is_not_asked_never_counts() -> None:
    one = record("q", "c", None, retrieval_time=1, context_length=5, success=True)
    other = record("q", "c", None, retrieval_time=2, context_length=6)
    assert key_of(one, None) == key_of(other, None)


def test_the_id_counts_only_when_sampling() -> None:
    lines = [record("q", "c", None, id=value) for value in ("1", 1, None, 10**30)]
    assert len({key_of(line) for line in lines}) == 1
    assert len({key_of(line, distinct=True) for line in lines}) == 4
    assert key_of(lines[0]) != key_of(lines[0], distinct=True)
    spaced = lines[0].replace(b'"1"', b'  "\\u0031"')
    assert key_of(lines[0], distinct=True) == key_of(spaced, distinct=True)


@given(values, values, texts, texts)
@settings(max_examples=50)
def test_an_id_and_a_field_can_not_be_shifted_into_each_other(
    value: Any, value2: Any, identifier: str, identifier2: str
) -> None:
    assume(value != value2 or identifier != identifier2)
    one = record("q", "c", None, id=identifier, x=value)
    other = record("q", "c", None, id=identifier2, x=value2)
    assert key_of(one, ("x",), distinct=True) != key_of(other, ("x",), distinct=True)


def test_another_run_has_other_keys() -> None:
    line = record("q", "c", None)
    assert key_of(line) != key_of(line, run_key=bytes(16))
    assert len(key_of(line)) == 16


def test_a_key_is_what_it_was() -> None:
    """Shards outlive a version: keys may only change together with the identity's format."""
    line = as_line({"id": "a", "query": "怎么?", "context": "c", "retrieval_method": "m", "x": [1]})
    assert key_of(line).hex() == "1e2a462394bfef2238c1f58a9e23f4a9"
    assert key_of(line, ("x",), distinct=True).hex() == "e08b23ef74ca2da9ae02896ebf9dbb4b"
    assert repeat_key(bytes(16), 1).hex() == "fa6a621d5a0a0fc87d8251345ac076b9"


def test_repeats_of_a_key_are_all_different() -> None:
    keys = [repeat_key(RUN_KEY, n) for n in range(1000)]
    assert keys[0] == RUN_KEY
    assert len(set(keys)) == 1000


@given(values)
def test_a_normalised_value_is_the_same_value_and_stays(value: Any) -> None:
    normal = normalise_json(as_line(value, ensure_ascii=True, indent=2))
    assert json.loads(normal) == value
    assert normalise_json(normal) == normal


@given(st.dictionaries(texts, values, max_size=6), queries, texts)
def test_rows_keep_what_records_say(others: dict[str, Any], query: str, context: str) -> None:
    record = {**others, "query": query, "context": context}
    for ensure_ascii in (False, True):
        row = row_of(as_line(record, ensure_ascii=ensure_ascii), include_context=True)
        pairs = json.loads(row, object_pairs_hook=list)
        assert len({name for name, _ in pairs}) == len(pairs)
        result = msgspec.json.decode(row)
        assert isinstance(result, dict)
        taken = {*OUTPUT_FIELDS, *OWN_FIELDS, "success"}
        for name in record.keys() - taken:
            assert result[name] == record[name]
        passed = [name for name in record if name in result and name not in {*taken, "context"}]
        place = {name: number for number, (name, _) in enumerate(pairs)}
        assert all(place[a] < place[b] for a, b in pairwise(passed))

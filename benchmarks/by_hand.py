"""What overhead.py compares with: the same job as a script of one's own, without a model.

    python benchmarks/by_hand.py contexts.jsonl output.jsonl --passes 3

Three passes: 1. read every line, check it and hash its question and context; 2. answer each
distinct question, one `write` per answer to a shard of documented rows; 3. merge: for each line its
own metadata (equal questions share an answer, not an id) and the answer, read from the shard at its
offset. One pass: read, answer, write.

This is the fast way to do it with msgspec, and it leaves out what ragfleet is for: nothing is
resumed, synced or renamed, one bad line ends it, memory holds a Python object per record. The
answer to a question is the question, as with `--engine echo`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import msgspec
import xxhash
from msgspec import Raw

NULL = Raw(b"null")
BUFFER_BYTES = 1 << 20


class Question(msgspec.Struct):
    """What pass 1 looks at."""

    query: str
    context: str


class Metadata(msgspec.Struct):
    """What an output line repeats of an input line. What is only copied stays the JSON it was."""

    query: str
    id: Raw = NULL
    original_item_id: Raw = NULL
    query_index: Raw = NULL
    dedup_key: Raw = NULL
    target_api: Raw = NULL
    dependencies: Raw = NULL
    retrieval_method: Raw = NULL
    context_length: Raw = NULL
    retrieval_time: float = 0.0


class Record(Metadata, kw_only=True):
    """An input line."""

    context: str


class Result(msgspec.Struct):
    """An output line: the documented keys, in their order."""

    id: Raw
    original_item_id: Raw
    query_index: Raw
    dedup_key: Raw
    query: str
    target_api: Raw
    dependencies: Raw
    retrieval_method: Raw
    context_length: Raw
    answer: str
    retrieval_time: float
    inference_time: float
    total_time: float
    worker_rank: int
    success: bool
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Answer(msgspec.Struct):
    """What pass 3 takes from a row of the shard."""

    answer: str
    inference_time: float
    worker_rank: int
    success: bool
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


decode_question = msgspec.json.Decoder(Question).decode
decode_record = msgspec.json.Decoder(Record).decode
decode_metadata = msgspec.json.Decoder(Metadata).decode
decode_answer = msgspec.json.Decoder(Answer).decode
encode = msgspec.json.Encoder().encode


def generate(query: str, context: str) -> str:
    """Where a model would be."""
    return query


def answer(record: Record) -> Answer:
    started = time.monotonic()
    text = generate(record.query, record.context)
    return Answer(text, time.monotonic() - started, 0, True, "stop", None, None)


def row(record: Metadata, answer: Answer) -> bytes:
    """The documented row of one input line."""
    result = Result(
        record.id,
        record.original_item_id,
        record.query_index,
        record.dedup_key,
        record.query,
        record.target_api,
        record.dependencies,
        record.retrieval_method,
        record.context_length,
        answer.answer,
        record.retrieval_time,
        answer.inference_time,
        record.retrieval_time + answer.inference_time,
        answer.worker_rank,
        answer.success,
        answer.finish_reason,
        answer.prompt_tokens,
        answer.completion_tokens,
    )
    return encode(result) + b"\n"


def three_passes(contexts_file: Path, output_file: Path) -> None:
    keys: list[bytes] = []
    with open(contexts_file, "rb", buffering=BUFFER_BYTES) as contexts:
        for line in contexts:
            question = decode_question(line)
            text = question.query.encode() + b"\0" + question.context.encode()
            keys.append(xxhash.xxh3_128_digest(text))

    shard_file = output_file.with_suffix(".shard.jsonl")
    places: dict[bytes, tuple[int, int]] = {}
    position = 0
    shard = os.open(shard_file, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
    with open(contexts_file, "rb", buffering=BUFFER_BYTES) as contexts:
        for key, line in zip(keys, contexts, strict=True):
            if key not in places:
                record = decode_record(line)
                shard_line = row(record, answer(record))
                os.write(shard, shard_line)
                places[key] = (position, len(shard_line))
                position += len(shard_line)

    with (
        open(contexts_file, "rb", buffering=BUFFER_BYTES) as contexts,
        open(output_file, "wb", buffering=BUFFER_BYTES) as output,
    ):
        for key, line in zip(keys, contexts, strict=True):
            offset, length = places[key]
            answered = decode_answer(os.pread(shard, length, offset))
            output.write(row(decode_metadata(line), answered))
    os.close(shard)


def one_pass(contexts_file: Path, output_file: Path) -> None:
    with (
        open(contexts_file, "rb", buffering=BUFFER_BYTES) as contexts,
        open(output_file, "wb", buffering=BUFFER_BYTES) as output,
    ):
        for line in contexts:
            record = decode_record(line)
            output.write(row(record, answer(record)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contexts_file", type=Path)
    parser.add_argument("output_file", type=Path)
    parser.add_argument("--passes", type=int, choices=(1, 3), default=3)
    args = parser.parse_args()
    loop = three_passes if args.passes == 3 else one_pass
    loop(args.contexts_file, args.output_file)


if __name__ == "__main__":
    main()

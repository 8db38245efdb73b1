"""What overhead.py compares with: the same job as a script of one's own, without a model.

    python benchmarks/by_hand.py contexts.jsonl output.jsonl --passes 3

Three passes: 1. read every line, check it and hash its question and context; 2. answer each
distinct question, one `write` per answer to a shard of documented rows; 3. merge the shard into
input order. One pass: read, answer, write.

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


class Record(msgspec.Struct):
    """An input line. Fields that are only copied stay the JSON they came as."""

    query: str
    context: str
    id: Raw = NULL
    original_item_id: Raw = NULL
    query_index: Raw = NULL
    dedup_key: Raw = NULL
    target_api: Raw = NULL
    dependencies: Raw = NULL
    retrieval_method: Raw = NULL
    context_length: Raw = NULL
    retrieval_time: float = 0.0


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
    worker_rank: int = 0
    success: bool = True
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


decode_question = msgspec.json.Decoder(Question).decode
decode_record = msgspec.json.Decoder(Record).decode
encode = msgspec.json.Encoder().encode


def generate(query: str, context: str) -> str:
    """Where a model would be."""
    return query


def answer(line: bytes) -> bytes:
    """The documented row of one input line."""
    record = decode_record(line)
    started = time.monotonic()
    text = generate(record.query, record.context)
    seconds = time.monotonic() - started
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
        text,
        record.retrieval_time,
        seconds,
        record.retrieval_time + seconds,
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
                row = answer(line)
                os.write(shard, row)
                places[key] = (position, len(row))
                position += len(row)

    with open(output_file, "wb", buffering=BUFFER_BYTES) as output:
        for key in keys:
            offset, length = places[key]
            output.write(os.pread(shard, length, offset))
    os.close(shard)


def one_pass(contexts_file: Path, output_file: Path) -> None:
    with (
        open(contexts_file, "rb", buffering=BUFFER_BYTES) as contexts,
        open(output_file, "wb", buffering=BUFFER_BYTES) as output,
    ):
        for line in contexts:
            output.write(answer(line))


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

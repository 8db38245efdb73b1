"""What overhead.py compares with: datatrove passing the same records through a step that does
nothing.

    python benchmarks/by_datatrove.py contexts.jsonl output_folder

JsonlReader → no-op → JsonlWriter, uncompressed, one task, one worker. The last line of its output
is the time without imports, as JSON: {"seconds": 4.2}.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


class NoOp(PipelineStep):
    """Where a model would be."""

    name = "no-op"

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        yield from data


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contexts_file", type=Path)
    parser.add_argument("output_folder", type=Path)
    args = parser.parse_args()
    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(
                str(args.contexts_file.parent),
                glob_pattern=args.contexts_file.name,
                text_key="context",
            ),
            NoOp(),
            JsonlWriter(str(args.output_folder), output_filename="${rank}.jsonl", compression=None),
        ],
        tasks=1,
        workers=1,
        logging_dir=str(args.output_folder / "logs"),
        skip_completed=False,
    )
    executor.run()
    print(json.dumps({"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()

"""Text that a model, a record or a user's code brought, made safe to print.

Pure, and below everything that prints or logs: a terminal obeys control characters wherever they
come from.
"""

from __future__ import annotations

import logging
import re
from typing import Final

_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Without what could move a cursor, change a colour or reverse the reading order."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """The same without line ends, for names: an id must not look like a line of ours."""
    return printable(" ".join(text.split()))


def indented(text: str) -> str:
    """The same with further lines set in, for messages of others."""
    return printable("\n    ".join(text.splitlines()))


class PlainFormatter(logging.Formatter):
    """Log lines that are safe to `cat`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

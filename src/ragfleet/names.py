"""Whether the names that a configuration gives can be written down.

A run keeps paths and settings in JSON files, which are UTF-8; bytes of a name that are not, or that
a locale of ASCII can't tell, reach Python as lone surrogates.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Final

from ragfleet.config import RunConfig
from ragfleet.errors import ConfigError

_IN_PLACE: Final = ("contexts_file", "output_file")
"""Kept as absolute paths, so that the working directory is a part of them."""


def check_names(config: RunConfig) -> None:
    """Raises ConfigError for a path or a name that is not text."""
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if not isinstance(value, str | Path):
            continue
        text = str(value)
        if setting.name in _IN_PLACE:
            text = str(Path(value).absolute())
        if not text.isascii():
            _check_text(f"--{setting.name}", text, isinstance(value, Path))


def _check_text(flag: str, text: str, is_path: bool) -> None:
    shown = text.encode("utf-8", "backslashreplace").decode()
    try:
        shown = text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise ConfigError(
            f"{flag} {shown} is not UTF-8, and a run writes its names down as text; rename it or"
            " give another name."
        ) from None
    try:
        text.encode()
        if is_path:
            os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{flag} {shown} can't be told in this locale, which knows ASCII alone: set LC_ALL to"
            " C.UTF-8, or PYTHONUTF8 to 1."
        ) from None

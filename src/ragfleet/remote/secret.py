"""The API key: read late, shown never.

A key comes from the environment or a file, in the process that sends it. It is in no flag, plan or
log, and whatever text a server sends back passes `redact` before anybody may write it down.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ragfleet.errors import ConfigError
from ragfleet.remote.spec import RemoteSpec

_SHOWN: Final = "(API key)"
_SHORTEST_SECRET: Final = 8
"""Local servers are given keys like EMPTY or none, and such words stand in many a message."""


class ApiKey:
    """A key that no formatting, traceback or dump shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """For the one place that puts it on the wire."""
        return self._value

    def redact(self, text: str) -> str:
        """The text without the key, should a server have repeated it."""
        if len(self._value) < _SHORTEST_SECRET:
            return text
        text = text.replace(self._value, _SHOWN)
        # Of a long reply only the beginning is kept, which may end within the key.
        lengths = range(len(self._value) - 1, _SHORTEST_SECRET - 1, -1)
        cut = next((num for num in lengths if text.endswith(self._value[:num])), 0)
        return text[:-cut] + _SHOWN if cut else text

    def __repr__(self) -> str:
        return f"ApiKey({_SHOWN})"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("an API key is not to be copied into another process")


def read_key(spec: RemoteSpec, environ: Mapping[str, str]) -> ApiKey | None:
    """The key of a run; None where the server wants none and none is set.

    Raises:
        ConfigError: it is missing or can't be one, with what to set.
    """
    origin = spec.key_env
    if spec.key_file is not None:
        origin = spec.key_file
        try:
            text = Path(spec.key_file).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"--api_key_file {spec.key_file} can't be read: {reason}.") from None
    else:
        text = environ.get(spec.key_env, "") or _stored_token(spec)
    value = text.strip()
    if not value:
        if spec.key_file is None and not spec.key_needed:
            return None
        raise ConfigError(
            f"There is no API key for {spec.base_url}: set {spec.key_env} in the environment, or"
            " name a file that holds it with --api_key_file."
        )
    # Of what is wrong with a key, only where it came from may be said.
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"What stands in {origin} is no API key: it holds blanks or other signs.")
    return ApiKey(value)


def key_notes(spec: RemoteSpec) -> list[str]:
    """What puts the key at risk."""
    notes = []
    if spec.key_file is not None:
        mode = Path(spec.key_file).expanduser().stat().st_mode
        if mode & 0o077:
            notes.append(
                f"--api_key_file {spec.key_file} can be read by others on this machine"
                f" (mode {mode & 0o777:o}): chmod 600 {spec.key_file}"
            )
    url = urllib.parse.urlsplit(spec.base_url)
    if url.scheme == "http" and not _is_local(url.hostname or ""):
        notes.append(f"{spec.base_url} is http: the API key and all prompts go there unencrypted")
    return notes


def _is_local(host: str) -> bool:
    """Loopback, a private network, or a name without a dot, as clusters have them."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost", ".internal"))


def _stored_token(spec: RemoteSpec) -> str:
    """What `hf auth login` has left, for Hugging Face."""
    if spec.provider != "huggingface":
        return ""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return ""
    token: str | None = get_token()
    return token or ""

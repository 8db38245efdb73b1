"""What `--extra_body` may not say: the fields of a request that ragfleet sets, and counts on.

They would win over what the flags ask: another length than --max_cost reckons with, another prompt
than the record's, replies in a form that nobody reads. Nor keys: a command line can be read by
everybody on the machine, and a run's settings are written down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ragfleet.errors import ConfigError

# Of chat and completions alike, so that a run's --api_format can change. "" where no flag sets it.
_RESERVED: Final[Mapping[str, str]] = {
    "best_of": "",
    "chat_template_kwargs": "--chat_template_kwargs",
    "echo": "",
    "max_completion_tokens": "--max_new_tokens",
    "max_new_tokens": "--max_new_tokens",
    "max_tokens": "--max_new_tokens",
    "messages": "--prompt_template and --system_prompt",
    "model": "--api_model_name",
    "n": "",
    "prompt": "--prompt_template and --system_prompt",
    "seed": "--seed",
    "stop": "--stop",
    "stream": "",
    "stream_options": "",
    "temperature": "--temperature",
    "top_p": "--top_p",
}
_SECRETS: Final = frozenset(
    {"accesstoken", "apikey", "apitoken", "authorization", "authtoken", "bearertoken", "hftoken"}
    | {"password", "secret", "xapikey"}
)
"""In lower case, without what stands between words."""


def check_extra_body(body: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that is ragfleet's to set, for a key, and for what JSON can't
    hold.
    """
    for name, value in body.items():
        if name in _RESERVED:
            flag = _RESERVED[name]
            use = f"use {flag} instead" if flag else "leave it out"
            raise ConfigError(f"--extra_body: ragfleet sets {name} itself; {use}.")
        secret = _secret_in(name, value)
        if secret is not None:
            raise ConfigError(
                f"--extra_body: {secret} looks like a key, and this is written into the run's"
                " settings; keys belong into the environment or --api_key_file."
            )
        if not _is_finite(value):
            raise ConfigError(
                f"--extra_body: {name} holds NaN or a number beyond a float's range, which JSON"
                " can't carry; leave it out."
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def _secret_in(name: str, value: Any) -> str | None:
    """The first name, at any depth, of what nobody else may read: a text, for a JSON schema has
    such names too."""
    if isinstance(value, str):
        plain = "".join(filter(str.isalnum, name)).lower()
        return name if value and plain in _SECRETS else None
    if isinstance(value, Mapping):
        return next(filter(None, (_secret_in(str(key), item) for key, item in value.items())), None)
    if isinstance(value, list | tuple):
        return next(filter(None, (_secret_in("", item) for item in value)), None)
    return None

"""What a reply's headers say of time: how long to wait, and how much may be asked.

Pure: header texts in, seconds and rates out. Knows the forms of OpenAI (durations like `6m0s`),
of Together (a limit a second) and of plain HTTP.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Final

import msgspec

_UNITS_S: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|us|d|h|m|s))")
_LONGEST_PAUSE_S: Final = 3600.0
_SHARE: Final = 0.05


class RateHeaders(msgspec.Struct, frozen=True, kw_only=True):
    """Rates per minute that the server enforces, and how long it takes nothing more."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    pause_s: float | None = None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of retry-after-ms or Retry-After (a number or a date); None without one."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return max(milliseconds / 1000, 0.0)
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is None:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0)


def read_rates(headers: Mapping[str, str], period_s: float = 60.0) -> RateHeaders:
    """`period_s` is that of limits without a suffix (a second at Together)."""
    requests, pause = _rate(headers, "x-ratelimit-limit-requests", "-requests", 60.0)
    if requests is None:
        requests, pause = _rate(headers, "x-ratelimit-limit", "", period_s)
    tokens, token_pause = _rate(headers, "x-ratelimit-limit-tokens", "-tokens", 60.0)
    if tokens is None:
        limit = _number(headers.get("x-tokenlimit-limit"))
        tokens = limit * 60.0 / period_s if limit else None
    pauses = [seconds for seconds in (pause, token_pause) if seconds is not None]
    return RateHeaders(
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        pause_s=min(max(pauses), _LONGEST_PAUSE_S) if pauses else None,
    )


def _rate(
    headers: Mapping[str, str], name: str, suffix: str, period_s: float
) -> tuple[float | None, float | None]:
    """(limit per minute, seconds to wait where nothing is left)."""
    limit = _number(headers.get(name))
    if not limit or limit <= 0:
        return None, None
    remaining = _number(headers.get(f"x-ratelimit-remaining{suffix}"))
    reset_s = duration_s(headers.get(f"x-ratelimit-reset{suffix}"))
    # Some providers put a limit per day here. Reset is the time until all of it is there again, so
    # the two tell how fast it comes back.
    if remaining is not None and reset_s and reset_s > period_s:
        refill_per_s = (limit - remaining) / reset_s
        if refill_per_s < limit / period_s / 2:
            return None, reset_s if remaining <= 0 else None
    pause_s = None
    if remaining is not None and remaining <= 0 and reset_s is not None:
        # Reset is when everything is there again; a twentieth of it is enough to go on with.
        pause_s = min(reset_s, max(1.0, _SHARE * reset_s))
    return limit * 60.0 / period_s, pause_s


def duration_s(text: str | None) -> float | None:
    """`1s`, `6m0s`, `12ms`, or a plain number of seconds; None for anything else."""
    if text is None:
        return None
    number = _number(text)
    if number is not None:
        # A moment instead of a duration (seconds since 1970) is left to Retry-After.
        return number if 0 <= number < 1e6 else None
    parts = _DURATION.findall(text)
    if not parts or "".join(value + unit for value, unit in parts) != text.strip():
        return None
    return sum(float(value) * _UNITS_S[unit] for value, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < 1e15 else None

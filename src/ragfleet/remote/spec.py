"""What a remote API is to a run: where it is, how it is asked, what it may cost.

Owns the settings that travel to workers, and what is known of each provider. There is no key in it:
a worker reads the environment or the key file itself (`remote.secret`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

ProviderName = Literal["openai", "togetherai", "huggingface"]
ApiFormat = Literal["chat", "completion"]
ApiMode = Literal["realtime", "batch"]

PATHS: Final[Mapping[str, str]] = {"chat": "/chat/completions", "completion": "/completions"}
DEFAULT_CONCURRENCY: Final = 64


@dataclass(frozen=True)
class Provider:
    """What differs from one provider to the next.

    Attributes:
        base_url: where it is when nothing else is said.
        base_url_env: the environment variable its own SDK reads for that.
        key_env: the environment variable with the key.
        limit_period_s: of its x-ratelimit-limit header without a suffix.
        batch_bytes: the largest batch file it takes.
    """

    base_url: str
    base_url_env: str | None
    key_env: str
    limit_period_s: float = 60.0
    batch_bytes: int = 0
    batch_requests: int = 50_000


PROVIDERS: Final[Mapping[ProviderName, Provider]] = {
    "openai": Provider(
        "https://api.openai.com/v1",
        "OPENAI_BASE_URL",
        "OPENAI_API_KEY",
        batch_bytes=200_000_000,
    ),
    "togetherai": Provider(
        "https://api.together.xyz/v1",
        "TOGETHER_BASE_URL",
        "TOGETHER_API_KEY",
        limit_period_s=1.0,
        batch_bytes=100_000_000,
    ),
    "huggingface": Provider("https://router.huggingface.co/v1", None, "HF_TOKEN"),
}


class RemoteSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs to ask; rates per minute and for the whole run."""

    provider: ProviderName
    base_url: str
    model: str
    key_env: str
    key_file: str | None = None
    key_needed: bool = True
    api_format: ApiFormat = "chat"
    api_mode: ApiMode = "realtime"
    extra_body: dict[str, Any] = {}
    max_concurrency: int = DEFAULT_CONCURRENCY
    """Requests on their way at a time, for each worker."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    price_in: float | None = None
    """Per million tokens of prompts, in the user's currency."""
    price_out: float | None = None
    max_cost: float | None = None
    max_tokens_total: int | None = None
    max_outage_s: float = 3600.0
    """How long a server may be dead before the run stops."""
    batch_requests: int = 50_000
    batch_bytes: int = 100_000_000
    batch_poll_s: float = 30.0

    @property
    def path(self) -> str:
        return PATHS[self.api_format]

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In the currency of the prices; 0 without prices."""
        price_in, price_out = self.price_in or 0.0, self.price_out or 0.0
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6

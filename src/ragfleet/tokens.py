"""Tokenizers without torch, and prompts that fit the model.

Owns the loading of a model's tokenizer, the rendering of its chat template, token counts and the
trimming of contexts. Engines and `ragfleet show` share it, so what is shown is what is sent. Knows
nothing of weights, GPUs, engines' loops or the input file.

`tokenizer.json` is read by the `tokenizers` package alone. Folders without one go through
transformers.AutoTokenizer, which imports torch: the only place here that can.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from ragfleet.engines.protocol import (
    Failure,
    Prepared,
    PromptSettings,
    Request,
    SamplingParams,
)
from ragfleet.errors import ModelError
from ragfleet.model_files import (
    SPECIAL_TOKENS,
    chat_template,
    configured_eos_ids,
    read_json,
    special_tokens,
)
from ragfleet.prompts import (
    CustomPrompts,
    Message,
    RecordPromptError,
    build_messages,
    plain_prompt,
)

_PROBE = "ragfleet-system-probe"
_ADVICE = (
    "Use --truncate_context head or tail (on a finished run together with --retry_failed), or a"
    " shorter answer."
)


class Backend(Protocol):
    """What is needed of a tokenizer: ids, character offsets and text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Per token of `text` without special tokens: its first and one-past-last character."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...


_FAR: Final = 32
"""Characters for each token that there is room for: so many of any text are some times as many."""
_LEAST_FAR: Final = 1024


class PromptTokenizer:
    """A model's tokenizer and chat template. Make one with `load_tokenizer`."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        eos_ids: Sequence[int],
        pad_id: int,
        notes: Sequence[str] = (),
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.eos_ids = tuple(eos_ids)
        """Ids that end an answer; sorted."""
        self.pad_id = pad_id
        self.notes = list(notes)
        """Lines for the log."""
        self._system_role: bool | None = None

    @property
    def uses_clock(self) -> bool:
        """Whether the chat template prints the date, so that the clock is part of the prompt."""
        return self.chat_template is not None and "strftime_now" in self.chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return self._backend.offsets(text)

    def tokens_far_above(self, most: int | None, prompt: str) -> int | None:
        """How many tokens the begin of a prompt has alone, where that is far above `most`; None:
        ask for the whole. One of 50 MB would take minutes and gigabytes, only to be refused."""
        if most is None:
            return None
        most = max(most, _LEAST_FAR)
        begin = prompt[: _FAR * most]
        count = len(self._backend.encode(begin, False)) if len(begin) < len(prompt) else 0
        return count if count > 2 * most else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; an incomplete character at an end comes out as U+FFFD."""
        return self._backend.decode(ids)

    def render(self, messages: Sequence[Message], settings: PromptSettings) -> tuple[str, bool]:
        """Prompt text, and whether the tokenizer shall add its own special tokens (BOS) to it.

        Chat templates write them themselves. Raises RecordPromptError when the template refuses.
        """
        if self.chat_template is None:
            if isinstance(settings, CustomPrompts):  # a user's own prompt is not touched
                return messages[-1]["content"], True
            return plain_prompt(messages), True
        if self._system_role is None and len(messages) > 1:
            self._system_role = self._takes_system_role(settings)
        if self._system_role is False and len(messages) > 1:
            messages = _merged(messages)
        return self._render_chat(messages, settings), False

    def _takes_system_role(self, settings: PromptSettings) -> bool:
        # Some templates refuse a system message (Gemma 2), some silently drop it: asked once, with
        # fixed messages, so that all records of a run are treated alike.
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            if _PROBE in self._render_chat(probe, settings):
                return True
            if _PROBE not in self._render_chat(_merged(probe), settings):
                return True
        except RecordPromptError:
            try:
                self._render_chat(_merged(probe), settings)
            except RecordPromptError:
                return True  # broken either way: each record reports it
        self.notes.append(
            "the model's chat template takes no system message: it goes before the user message"
        )
        return False

    def _render_chat(self, messages: Sequence[Message], settings: PromptSettings) -> str:
        from ragfleet.chat_templates import render_chat

        variables = {**self.special_tokens, **settings.chat_template_kwargs}
        assert self.chat_template is not None
        try:
            return render_chat(self.chat_template, messages, variables, settings.clock)
        except Exception as error:  # a template is code from a model folder: it can raise anything
            raise RecordPromptError(
                f"the model's chat template failed: {type(error).__name__}: {error}"
            ) from error


def _merged(messages: Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


# ---- loading ----------------------------------------------------------------------------------


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> PromptTokenizer:
    """Raises ModelError naming the file that is missing or broken, and what to do."""
    if not model_dir.is_dir():
        raise ModelError(
            f"{model_dir}: no such folder; --model_path must be a folder with config.json,"
            " tokenizer.json and *.safetensors (for a Hub id add --inference_type huggingface)."
        )
    config = read_json(model_dir / "tokenizer_config.json")
    notes: list[str] = []
    backend: Backend
    if (model_dir / "tokenizer.json").is_file():
        special = special_tokens(model_dir, config)
        backend = _load_fast(model_dir / "tokenizer.json", config, special)
        template = chat_template(model_dir, config)
    else:
        backend, special, template = _load_auto(model_dir, trust_remote_code)
        notes.append(
            f"{model_dir.name} has no tokenizer.json: its tokenizer is loaded through transformers"
        )
    end = special.get("eos_token")
    end_id = backend.token_id(end) if end is not None else None
    # Both the configured ids and the tokenizer's own end an answer, as in vLLM.
    eos_ids = sorted(configured_eos_ids(model_dir) | ({end_id} if end_id is not None else set()))
    pad = special.get("pad_token")
    pad_id = backend.token_id(pad) if pad is not None else None
    if pad_id is None:  # padding is masked out, so any valid id serves
        pad_id = eos_ids[0] if eos_ids else 0
    return PromptTokenizer(
        backend,
        special_tokens=special,
        chat_template=template,
        eos_ids=eos_ids,
        pad_id=pad_id,
        notes=notes,
    )


class _FastBackend:
    """A `tokenizers.Tokenizer`, cleaned of the truncation and padding its file may switch on."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # bare Exceptions and TypeErrors, for text that is not Unicode
            raise RecordPromptError(f"the tokenizer refuses the prompt: {error}") from error
        ids: list[int] = encoding.ids
        return ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        offsets: list[tuple[int, int]]
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        index: int | None = self._tokenizer.token_to_id(token)
        return index


class _SlowBackend:
    """A Python tokenizer of transformers; it has no offsets, so they are spread evenly."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        count = len(self.encode(text, add_special_tokens=False))
        bounds = [index * len(text) // max(count, 1) for index in range(count + 1)]
        return list(itertools.pairwise(bounds))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        index: int | None = self._tokenizer.get_vocab().get(token)
        return index


def _load_fast(path: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> _FastBackend:
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for whatever it cannot parse
        raise ModelError(
            f"{path}: not a tokenizer that this version of the tokenizers package reads ({error});"
            " download the file again or upgrade tokenizers."
        ) from error
    # As transformers does: tokens that only tokenizer_config.json knows are added in order, and the
    # named ones are special even where tokenizer.json says otherwise (decode leaves them out).
    added = config.get("added_tokens_decoder") or {}
    for index, fields in sorted((int(index), fields) for index, fields in added.items()):
        token = AddedToken(**fields)
        if tokenizer.id_to_token(index) is None and tokenizer.get_vocab_size() == index:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    known = [token for token in special.values() if tokenizer.token_to_id(token) is not None]
    ordinary = set(known) - {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    marked = [t for t in tokenizer.get_added_tokens_decoder().values() if t.content in known]
    tokenizer.add_special_tokens(
        [_special(token) for token in marked if not token.special]
        + [AddedToken(token, special=True, normalized=False) for token in sorted(ordinary)]
    )
    return _FastBackend(tokenizer)


def _special(token: Any) -> Any:
    token.special = True
    return token


def _load_auto(
    model_dir: Path, trust_remote_code: bool
) -> tuple[Backend, dict[str, str], str | None]:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"{model_dir}: there is no tokenizer.json, and without transformers nothing else can be"
            " read; add the file or `pip install transformers`."
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # every tokenizer class fails in its own way
        raise ModelError(
            f"{model_dir}: there is no tokenizer.json, and transformers cannot load a tokenizer"
            f" from the other files: {error}"
        ) from error
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    fast = tokenizer.is_fast
    return (
        _FastBackend(tokenizer.backend_tokenizer) if fast else _SlowBackend(tokenizer),
        {name: token for name, token in special.items() if name in SPECIAL_TOKENS},
        template,
    )


# ---- prompts that fit -------------------------------------------------------------------------


def prepare_prompt(
    request: Request,
    settings: PromptSettings,
    tokenizer: PromptTokenizer,
    sampling: SamplingParams,
    max_model_len: int | None,
) -> Prepared | Failure:
    """Render and tokenise one request so that prompt plus answer fit into `max_model_len` tokens.

    A longer one is a `too_long` failure, or loses tokens at the head or the tail of its context
    (`truncate_context`); the rest of the prompt is never cut.
    """

    def render(context: str) -> tuple[str, bool]:
        messages = build_messages(
            settings, request.record, request.query, context, request.retrieval_method
        )
        return tokenizer.render(messages, settings)

    budget = None if max_model_len is None else max_model_len - sampling.max_new_tokens
    try:
        prompt, adds = render(request.context)
        most = budget if settings.truncate_context == "error" else None
        if (least := tokenizer.tokens_far_above(most, prompt)) is not None:
            return _too_long(request, least, sampling, max_model_len, " and more")
        ids = tokenizer.encode(prompt, adds)
        if not ids:
            raise RecordPromptError("the prompt is empty")
        if budget is None or len(ids) <= budget:
            return Prepared(request=request, prompt=prompt, token_ids=ids)
        if settings.truncate_context == "error":
            return _too_long(request, len(ids), sampling, max_model_len)
        offsets = tokenizer.offsets(request.context)
        keep, length = len(offsets), len(ids)
        while keep > 0:
            # A token less in the context is about one less in the prompt; where tokens merge anew
            # at the cut it is fewer, so the rest is measured and cut again.
            keep = max(0, keep - (length - budget))
            prompt, adds = render(_cut(request.context, offsets, keep, settings.truncate_context))
            ids = tokenizer.encode(prompt, adds)
            length = len(ids)
            if length <= budget:
                return Prepared(
                    request=request,
                    prompt=prompt,
                    token_ids=ids,
                    truncated_tokens=len(offsets) - keep,
                )
        return _too_long(request, length, sampling, max_model_len, " without its context", "")
    except RecordPromptError as error:
        return Failure(key=request.key, error_type=error.error_type, error=str(error))


def _cut(text: str, offsets: Sequence[tuple[int, int]], keep: int, side: str) -> str:
    """`keep` tokens of `text` from its end ("head" is cut) or its start; never half a character."""
    if keep == 0:
        return ""
    if side == "head":
        return text[offsets[-keep - 1][1] :]
    return text[: offsets[keep][0]]


def _too_long(
    request: Request,
    length: int,
    sampling: SamplingParams,
    max_model_len: int | None,
    which: str = "",
    advice: str = f" {_ADVICE}",
) -> Failure:
    wanted = length + sampling.max_new_tokens
    return Failure(
        key=request.key,
        error_type="too_long",
        error=f"the prompt has {length} tokens{which} and --max_new_tokens is"
        f" {sampling.max_new_tokens}: {wanted} together, but the model takes {max_model_len}."
        + advice,
    )

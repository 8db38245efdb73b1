"""Users' own backends, tier 1: subclass QueryBasedInference and override one method.

    class MyInference(QueryBasedInference):
        def generate_answer(self, query, context, retrieval_method):
            return super().generate_answer(query, context.upper(), retrieval_method)

    if __name__ == "__main__":
        MyInference.main()

Owns that class; the engines that call it are in `query_engines`. Knows nothing of how the
configured engine works.

- Only `create_prompt` overridden: everything stays batched in the configured engine. The string
  returned is the user message; system message and chat template still apply. A model without a chat
  template gets the string as it is.
- `generate_answer` overridden: called one at a time, or, as `async def`, concurrently up to
  --batch_size (default 8). The configured engine is loaded by the first `super().generate_answer`,
  so a class that asks an API needs no model; that first call takes as long as the loading.
- `super().generate_answer` is a plain call that returns a string, inside `async def` too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

from ragfleet.engines.protocol import Failure, FinishReason, PromptSettings, Request
from ragfleet.errors import ConfigError
from ragfleet.prompts import render_template, user_message


class AnswerFailed(RuntimeError):
    """Raised by `super().generate_answer` when the configured engine has no answer.

    Uncaught, the row fails with the engine's own error type; `failure` holds it.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.failure = failure


@dataclass
class Current:
    """What is being answered right now, and what the inner engine did for it so far."""

    request: Request
    num_calls: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: FinishReason = "stop"
    """Of the last call."""


# A context variable, because concurrent calls of one instance each have their own record.
current: ContextVar[Current] = ContextVar("ragfleet_current")


class Runner(Protocol):
    """What the class needs of the engine that calls it."""

    @property
    def prompts(self) -> PromptSettings: ...

    def answer(self, query: str, context: str, retrieval_method: str | None) -> str: ...


class QueryBasedInference:
    """Base of users' backends. The attributes are the settings of the run."""

    version: ClassVar[str | None] = None
    """Change it when your code changes what is answered: finished answers are then not reused."""

    def __init__(
        self,
        model_path: str | None = None,
        inference_type: str = "local",
        max_new_tokens: int = 512,
        temperature: float = 0.2,
        top_p: float = 0.95,
        **settings: Any,
    ) -> None:
        self.model_path = model_path
        self.inference_type = inference_type
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.settings = settings

    def setup(self) -> None:
        """Called once in each worker, after its GPUs are set and before the first record."""

    def create_prompt(self, query: str, context: str, retrieval_method: str | None) -> str:
        """The user message. By default that of --prompt_template, or the built-in one."""
        prompts = self._bound().prompts
        if prompts.template is not None:
            return render_template(prompts.template, self.record, query, context, retrieval_method)
        return user_message(query, context, retrieval_method)

    def generate_answer(self, query: str, context: str, retrieval_method: str | None) -> Any:
        """The answer. This one runs the configured engine for one prompt, and returns its text.

        Raises AnswerFailed. The result is a string, or, in a subclass with `async def`, awaits one.
        """
        return self._bound().answer(query, context, retrieval_method)

    @property
    def record(self) -> Mapping[str, Any]:
        """The whole input line being answered, also in concurrent calls."""
        try:
            return current.get().request.record
        except LookupError:
            raise RuntimeError("self.record is set only while a record is being answered") from None

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> NoReturn:
        """`ragfleet infer` with this class; arguments are those of the command line by default."""
        from ragfleet.cli import main

        module = sys.modules[cls.__module__]
        file = getattr(module, "__file__", None)
        if file is None:
            raise ConfigError(f"{cls.__name__} must be in a file: workers import it from there.")
        arguments = sys.argv[1:] if argv is None else list(argv)
        sys.exit(main(["infer", "--inference_class", f"{file}:{cls.__qualname__}", *arguments]))

    _runner: Runner | None = None

    def _bound(self) -> Runner:
        if self._runner is None:
            raise RuntimeError(
                f"{type(self).__name__} is not running: use {type(self).__name__}.main() or"
                " ragfleet infer --inference_class file.py:ClassName"
            )
        return self._runner

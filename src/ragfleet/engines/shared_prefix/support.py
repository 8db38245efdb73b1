"""Which models the shared-prefix loop computes right.

Owns the check of a model's configuration, of what its layers ask of their attention, and the
self-check: logits of packed passes against the model's plain forward. What is not known to be right
is refused with a reason, and the engine then takes plain batches.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from ragfleet.engines.decoding import TokenChooser
from ragfleet.engines.shared_prefix.cache import Shape
from ragfleet.engines.shared_prefix.decoder import Decoder
from ragfleet.engines.shared_prefix.forward import Forward
from ragfleet.engines.shared_prefix.fused_layers import Fused
from ragfleet.engines.shared_prefix.scheduler import LEAST_COPIED, Limits, Row, Scheduler
from ragfleet.engines.shared_prefix.ways import Unsupported, Way

TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference of logits, relative to their spread over the vocabulary."""
_ROPE_BY_LENGTH: Final = ("dynamic", "longrope")
"""Angles that depend on the longest position of a forward, which packed prompts share."""
_HARMLESS: Final = frozenset({"position_ids", "cache_position", "is_causal", "position_embeddings"})


def check_config(model: Any, way: Way) -> None:
    """Raises Unsupported for what the configuration tells."""
    config = model.config.get_text_config()
    kind = config.model_type
    if model.dtype not in way.dtypes:
        known = sorted(str(dtype) for dtype in way.dtypes)
        raise Unsupported(f"it computes in {' and '.join(known)}, not {model.dtype}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise Unsupported("the weights are quantised")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise Unsupported("its layers are spread over GPUs")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise Unsupported(f"{kind} has layers of {', '.join(others)}")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in _ROPE_BY_LENGTH:
        raise Unsupported(f"{kind} has {rope_type} positions, which depend on the prompt's length")
    if not getattr(model, "_supports_attention_backend", False):
        raise Unsupported(f"{kind} has no exchangeable attention in this version of transformers")
    parameters = inspect.signature(model.forward).parameters
    missing = {"position_ids", "logits_to_keep", "use_cache"} - parameters.keys()
    if missing:
        raise Unsupported(f"{kind} takes no {', '.join(sorted(missing))}")


class Probe:
    """Looks at what each layer of a pass wants of its attention."""

    long_run = 8  # so that the head's two pieces go both ways

    def __init__(self, shape: Shape, max_model_len: int | None) -> None:
        self._shape = shape
        self._max_model_len = max_model_len
        self.layers: list[int] = []

    def check(self, module: Any, key: torch.Tensor, value: torch.Tensor, **others: Any) -> None:
        self.layers.append(module.layer_idx)
        kind = type(module).__name__
        wanted = (self._shape.num_kv_heads, self._shape.head_dim)
        for states in (key, value):
            if states.shape[1::2] != wanted:
                raise Unsupported(f"{kind} has keys and values of {tuple(states.shape)}")
        if not getattr(module, "is_causal", True):
            raise Unsupported(f"{kind} is not causal")
        window = others.pop("sliding_window", None)
        if window is not None and (self._max_model_len is None or window < self._max_model_len):
            raise Unsupported(f"{kind} has a sliding window of {window} tokens")
        for name, other in others.items():
            strange = isinstance(other, (torch.Tensor, float)) or (
                type(other) is int and name not in ("layer_idx",)
            )
            if name not in _HARMLESS and strange:
                raise Unsupported(f"{kind} wants {name} of its attention")


def plain_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[tokens, vocab] of each prompt: batch size 1, no cache. Taken before anything is changed."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0]
            for prompt in prompts
        ]


def probe_prompts(vocab_size: int) -> list[list[int]]:
    """Four that share their first 21 tokens. Three of them share four more, which the second copies
    from the first one's slot, and the third, with one more, from the second's; the fourth goes on
    for long, in a node below the shared one. One alone. The last two of each are the answer."""
    rng = random.Random(20)
    ids = range(min(vocab_size, 30_000))
    head, question = rng.choices(ids, k=21), rng.choices(ids, k=LEAST_COPIED)
    ends = [[*question, *rng.choices(ids, k=3)], [*question, *rng.choices(ids, k=4)]]
    ends.append([*ends[1][: LEAST_COPIED + 1], *rng.choices(ids, k=3)])
    ends.append(rng.choices(ids, k=12))
    return [*(head + end for end in ends), rng.choices(ids, k=12)]


ANSWER: Final = 2
"""Tokens of a probe prompt that are fed one by one."""


def self_check(
    way: Way,
    forward: Forward,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    max_model_len: int | None,
    chooser: TokenChooser,
) -> None:
    """Raises Unsupported unless passes give the logits of the plain forward, with the way's decoder
    where it has one."""
    limits = Limits(
        num_slots=len(prompts),
        max_new_tokens=ANSWER + 1,
        pool_tokens=64,
        pass_tokens=19,  # so that the head is read in two pieces, and slots fill one by one
        own_tokens=8,  # so that the lonely prompt and the long one get nodes
    )
    scheduler, cache = Scheduler(limits), way.make_cache(shape, limits)
    cache.poison()  # memory given back by an earlier check may hold the very numbers wanted
    decoder = None
    if way.make_decoder is not None:
        decoder = way.make_decoder(forward, cache, chooser)
        decoder.keeps_logits = True
    for number, prompt in enumerate(prompts):
        scheduler.submit(bytes([number]), prompt[:-ANSWER])
    fed: dict[int, int] = {}
    last_tokens: dict[int, int] = {}
    while (scheduled := scheduler.next_pass()).num_tokens:
        if decoder is not None and not scheduled.runs:
            slots = [row.slot for row in scheduled.rows]
            logits = _decoded(decoder, scheduled.rows, last_tokens, chooser)
        else:
            probe = Probe(shape, max_model_len)
            tensors = way.make_pass(scheduled, last_tokens, cache, probe)
            slots, logits = tensors.slots, forward(tensors)
            if sorted(probe.layers) != list(range(shape.num_layers)):
                raise Unsupported(
                    f"{len(set(probe.layers))} of {shape.num_layers} layers have an attention that"
                    " can be exchanged"
                )
        for slot, ours in zip(slots, logits, strict=True):
            number = scheduler.key_of(slot)[0]
            count = fed.setdefault(number, 0)
            at = len(prompts[number]) - ANSWER + count
            _compare(ours, expected[number][at - 1])
            fed[number] += 1
            if count == ANSWER:
                scheduler.release(slot)
            else:
                last_tokens[slot] = prompts[number][at]
    assert fed == dict.fromkeys(range(len(prompts)), ANSWER + 1)


def _decoded(
    decoder: Decoder, rows: Sequence[Row], last_tokens: Mapping[int, int], chooser: TokenChooser
) -> torch.Tensor:
    """Logits [rows, vocab] of one step, after two at once were held against two single ones."""
    draws = [] if chooser.is_greedy else [[0.3] * len(rows), [0.6] * len(rows)]
    decoder.decode(rows, last_tokens, 1, draws[:1])  # those that follow may be captured ones
    burst = decoder.decode(rows, last_tokens, 2, draws)
    ours = _logits(decoder)
    single = decoder.decode(rows, last_tokens, 1, draws[:1])
    fed = {row.slot: token for row, token in zip(rows, single[0][0], strict=True)}
    later = [row._replace(position=row.position + 1, column=row.column + 1) for row in rows]
    single += decoder.decode(later, fed, 1, draws[1:])
    for one, other in zip(ours, _logits(decoder), strict=True):
        _compare(one, other, "those of single steps")
    if burst != single:
        raise Unsupported("several steps at once choose other tokens than single ones")
    decoder.decode(rows, last_tokens, 1, draws[:1])
    return _logits(decoder)


def _logits(decoder: Decoder) -> torch.Tensor:
    assert decoder.logits is not None
    return decoder.logits.clone()


def _compare(
    ours: torch.Tensor, plain: torch.Tensor, what: str = "the model's plain forward"
) -> None:
    spread = (plain.float() - plain.float().mean()).norm()
    difference = float((ours.float() - plain.float()).norm() / spread)
    if not difference <= TOLERANCE[plain.dtype]:  # NaN is not
        raise Unsupported(f"its logits differ from {what} by {difference:.2g} of their spread")


def ready(model: Any, way: Way, max_model_len: int | None, chooser: TokenChooser) -> Forward:
    """`model`, changed for passes and proved; unchanged where this raises Unsupported. Where it is
    not right with fused layers, it is tried without."""
    check_config(model, way)
    prompts = probe_prompts(model.get_input_embeddings().weight.shape[0])
    try:
        expected = plain_logits(model, prompts)
    except Exception as error:  # a model's forward can raise anything
        raise Unsupported(_line(error)) from error

    def proved(fused: Fused | None) -> Forward:
        forward = None
        try:
            forward = Forward(model, pack=way.packs_weights, fused=fused)
            self_check(way, forward, Shape.of(model), prompts, expected, max_model_len, chooser)
        except Exception as error:  # a model's forward can raise anything
            if forward is not None:
                forward.undo()
            if isinstance(error, Unsupported):
                raise
            raise Unsupported(_line(error)) from error
        return forward

    if way.fused is None:
        return proved(None)
    try:
        return proved(way.fused)
    except Unsupported as error:
        forward = proved(None)
        forward.notes.append(f"layers are the model's own: {error}")
        return forward


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

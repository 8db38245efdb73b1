"""The training loop: stages of growing contexts, two optimisers, checkpoints, a copy score.

Runs as one process or as several of one thread each, which share every step: they need no
agreement within an operation, so a busy machine slows them less than it does threads.
Reproducible from the seed for a number of processes: each stage draws its contexts from a
generator seeded by stage, and a resumed run replays the generator to where it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.circuits import plant
from pocket.model import Attention, Llama, Shape
from pocket.packing import Batch, Encoder, Row, pack
from pocket.sources import Block
from pocket.tasks import Generator, Mixture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stretch of training; contexts in tokens, steps counted in optimiser steps."""

    steps: int
    context_tokens: int
    blocks: tuple[int, ...]
    questions: int
    invented: float
    renamed: float = 0.5
    batch_tokens: int = 4096


STAGES = (
    Stage(200, 128, (1, 2, 2, 3), 6, invented=0.5),
    Stage(250, 256, (1, 1, 2, 3, 4), 8, invented=0.3, batch_tokens=5120),
    Stage(350, 512, (1, 1, 2, 2, 3, 4, 5), 10, invented=0.15),
    Stage(250, 1024, (1, 2, 3, 4, 5), 12, invented=0.1, batch_tokens=3072),
    Stage(3050, 1024, (1, 2, 2, 3, 4, 5), 12, invented=0.1),
    Stage(350, 1024, (2, 2, 3, 4, 5), 12, invented=0.05, renamed=0.3),
)


@dataclass(frozen=True)
class Settings:
    """Learning rates, and shares of the schedule (0 to 1)."""

    seed: int = 1
    muon_rate: float = 2e-3
    adam_rate: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.35
    plain_weight: float = 0.2
    plain_share: float = 0.25
    pointer_weight: float = 0.15
    bf16: bool = True
    planted: bool = True
    score_every: int = 200
    save_every: int = 100
    log_every: int = 25


def mixture_of(stage: Stage) -> Mixture:
    """Contexts from an eighth of the stage's limit up to it (about 2.2 characters a token)."""
    return Mixture(
        context_chars=(stage.context_tokens // 3, int(stage.context_tokens * 2.3)),
        blocks=stage.blocks,
        questions=stage.questions,
        invented=stage.invented,
        renamed=stage.renamed,
    )


def rows(generator: Generator, encoder: Encoder, context_tokens: int) -> Iterator[Row]:
    """Endless rows whose contexts have at most `context_tokens` tokens."""

    def fits(text: str) -> bool:
        return len(text) < 8 * context_tokens and len(encoder.encode(text)) <= context_tokens - 16

    while True:
        row = encoder.row(generator.group(fits))
        if row.tails:
            yield row


def batches(stream: Iterator[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows until they would hold more than `batch_tokens`."""
    held: list[Row] = []
    total = 0
    for row in stream:
        size = len(row.prefix) + sum(len(tail.tokens) for tail in row.tails)
        if held and total + size > batch_tokens:
            yield held
            held, total = [], 0
        held.append(row)
        total += size


NAME_HEAD = (1, 3)
COPY_HEAD = (3, 3)
"""(layer, head) taught where to look. `tools/pocket/circuits.py` plants nothing in them."""


def pointer_loss(model: Llama, batch: Batch) -> Tensor:
    """Mean of minus the log weight that two heads give the token they ought to look at.

    One finds the name that governs a token: of its block, or that asked about; the other, with
    that known, finds the token to say next. Answers alone teach such a chain of heads slowly.
    Attention is supervised as in arXiv 1609.04186; here it has an exact target.
    """
    layers = model.model.layers
    contexts, by_name = watched(layers[NAME_HEAD[0]])
    _, by_copy = watched(layers[COPY_HEAD[0]])
    terms = (
        looked_at(contexts[:, NAME_HEAD[1]], batch.named),
        looked_at(by_name[:, NAME_HEAD[1]], batch.tail_named),
        looked_at(by_copy[:, COPY_HEAD[1]], batch.copied),
    )
    return -torch.stack([weight.clamp_min(1e-6).log().mean() for weight in terms]).mean()


def watched(layer: nn.Module) -> tuple[Tensor, Tensor]:
    attention = layer.self_attn
    assert isinstance(attention, Attention)
    assert attention.watched is not None
    return attention.watched


def looked_at(weights: Tensor, targets: Tensor) -> Tensor:
    """`weights` `[R, Q, K]` at `targets` `[3, N]`; a one, which costs nothing, without targets."""
    row, query, key = targets
    return weights[row, query, key] if len(row) else weights.new_ones(1)


def loss_of(model: Llama, batch: Batch, settings: Settings) -> tuple[Tensor, Tensor]:
    """Loss to minimise, and the mean over answer tokens for the log (nats a token)."""
    states = model.hidden_states(batch.ids, batch.positions, batch.layout)
    picked = torch.rand(len(batch.plain_source)) < settings.plain_share
    source = torch.cat([batch.source, batch.plain_source[picked]])
    target = torch.cat([batch.target, batch.plain_target[picked]])
    each = F.cross_entropy(model.logits(states[source]).float(), target, reduction="none")
    answers = each[: len(batch.source)].mean()
    loss = answers
    if settings.pointer_weight:
        loss = loss + settings.pointer_weight * pointer_loss(model, batch)
    if settings.plain_weight and bool(picked.any()):
        loss = loss + settings.plain_weight * each[len(batch.source) :].mean()
    return loss, answers.detach()


@torch.no_grad()
def copy_score(model: Llama, batches: Sequence[Batch], bf16: bool) -> dict[str, float]:
    """Share of answers right in every token, by kind; what greedy decoding would give, exactly."""
    hits: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = model.hidden_states(batch.ids, batch.positions, batch.layout)
            right = model.logits(states[batch.source]).argmax(-1) == batch.target
        wrong = torch.zeros(len(batch.kinds)).index_add_(0, batch.owner, (~right).float())
        for (kind, absent), errors in zip(batch.kinds, wrong.tolist(), strict=True):
            hits["absent" if absent else kind].append(float(errors == 0))
    score = {kind: sum(values) / len(values) for kind, values in sorted(hits.items())}
    everything = [value for values in hits.values() for value in values]
    return {"all": sum(everything) / len(everything), **score}


def spread(flat: Tensor, into: Sequence[Tensor]) -> None:
    """Copy consecutive parts of `flat` into the tensors it was put together from."""
    at = 0
    for tensor in into:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()


class Trainer:
    """Model, optimisers and the step count; everything a checkpoint holds.

    Each of `world` processes updates its share of the matrices (Muon's work is worth sharing)
    and all of the rest.
    """

    def __init__(
        self,
        shape: Shape,
        settings: Settings,
        stages: Sequence[Stage],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.stages = settings, stages
        self.rank, self.world = rank, world
        self.total = sum(stage.steps for stage in stages)
        self.model = Llama(shape)
        if settings.planted:
            plant(self.model, settings.seed)
        for layer, _ in (NAME_HEAD, COPY_HEAD):
            attention = self.model.model.layers[layer].self_attn
            assert isinstance(attention, Attention)
            attention.keep_weights = bool(settings.pointer_weight)
        self.matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, weight in self.model.named_parameters():
            is_matrix = weight.dim() == 2 and "embed" not in name
            (self.matrices if is_matrix else rest).append(weight)
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                self.matrices[rank::world],
                lr=settings.muon_rate,
                weight_decay=0.05,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        torch.manual_seed(settings.seed + rank)
        self.step = 0
        self.seconds = 0.0

    def rate(self) -> float:
        """Multiplier of the learning rates: warm-up, flat, then down to zero as a square root."""
        warm = min(1.0, (self.step + 1) / self.settings.warmup_steps)
        left = (self.total - self.step) / max(1.0, self.settings.decay_share * self.total)
        return warm * (1.0 if left >= 1 else 1 - math.sqrt(1 - max(left, 0.0)))

    def update(self, batch: Batch) -> float:
        """One optimiser step; the mean loss over answer tokens."""
        rates = (self.settings.muon_rate, self.settings.adam_rate)
        for optimiser, base in zip(self.optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = base * self.rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            loss, answers = loss_of(self.model, batch, self.settings)
        loss.backward()  # type: ignore[no-untyped-call]
        self.share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.share_matrices()
        self.step += 1
        return float(answers)

    def share_gradients(self) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.world == 1:
            return
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        spread(flat / self.world, gradients)

    @torch.no_grad()
    def share_matrices(self) -> None:
        """Give every process the matrices that the others have updated."""
        for owner in range(self.world if self.world > 1 else 0):
            owned = self.matrices[owner :: self.world]
            flat = torch.cat([matrix.flatten() for matrix in owned])
            dist.broadcast(flat, src=owner)
            spread(flat, owned)

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its place, then move it there: never half a file.

        All processes must call it; the first one writes.
        """
        muon: list[dict[str, object]] = [self.optimisers[0].state_dict()] * self.world
        if self.world > 1:
            dist.all_gather_object(muon, self.optimisers[0].state_dict())
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "muon": muon,
            "adam": self.optimisers[1].state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "shape": asdict(self.model.shape),
        }
        beside = path.with_suffix(".partial")
        torch.save(state, beside)
        os.replace(beside, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if len(state["muon"]) != self.world:
            raise ValueError(f"{path} was written by {len(state['muon'])} processes: use as many")
        self.model.load_state_dict(state["model"])
        self.optimisers[0].load_state_dict(state["muon"][self.rank])
        self.optimisers[1].load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]


def held_out_batches(
    blocks: Sequence[Block], encoder: Encoder, stage: Stage, groups: int
) -> list[Batch]:
    """A fixed set of held-out contexts of the stage's length, nothing invented or renamed."""
    mixture = Mixture(
        context_chars=(stage.context_tokens // 3, int(stage.context_tokens * 2.3)),
        blocks=stage.blocks,
        invented=0.0,
        renamed=0.0,
        typed=0.0,
    )
    stream = rows(Generator(blocks, mixture, seed=777), encoder, stage.context_tokens)
    drawn = [next(stream) for _ in range(groups)]
    return [pack(drawn[at : at + 4]) for at in range(0, groups, 4)]


def train(
    trainer: Trainer,
    encoder: Encoder,
    blocks: Sequence[Block],
    held_out: Sequence[Block],
    folder: Path,
) -> None:
    """Run all stages from where `trainer` stands; logs to `train.jsonl`, saves `model.pt`."""
    first = 0
    for number, stage in enumerate(trainer.stages):
        last = first + stage.steps
        if trainer.step < last:
            seed = trainer.settings.seed * 1000 + number
            generator = Generator(blocks, mixture_of(stage), seed=seed)
            share = stage.batch_tokens // trainer.world
            stream = batches(rows(generator, encoder, stage.context_tokens), share)
            for _ in range((trainer.step - first) * trainer.world):
                next(stream)
            scored = held_out_batches(held_out, encoder, stage, groups=32)
            run_stage(trainer, stream, scored, last, folder)
        first = last


def run_stage(
    trainer: Trainer,
    stream: Iterator[list[Row]],
    scored: Sequence[Batch],
    last: int,
    folder: Path,
) -> None:
    """Train up to step `last`."""
    settings = trainer.settings
    losses: list[float] = []
    tokens = answers = 0
    started = time.monotonic()
    while trainer.step < last:
        before = time.monotonic()
        drawn = [next(stream) for _ in range(trainer.world)]
        batch = pack(drawn[trainer.rank])
        losses.append(trainer.update(batch))
        tokens += batch.ids.numel() * trainer.world
        answers += len(batch.kinds) * trainer.world
        trainer.seconds += time.monotonic() - before
        if trainer.step % settings.save_every == 0 or trainer.step == last:
            trainer.save(folder / "model.pt")
        if trainer.rank:
            continue
        entry: dict[str, object] = {"step": trainer.step}
        if trainer.step % settings.log_every == 0:
            spent = time.monotonic() - started
            entry["loss"] = round(sum(losses) / len(losses), 4)
            entry["tokens_per_s"] = round(tokens / spent)
            entry["answers_per_s"] = round(answers / spent, 1)
            with torch.no_grad():
                entry["pointers"] = round(float(pointer_loss(trainer.model, batch)), 3)
            entry["train_s"] = round(trainer.seconds)
            losses, tokens, answers, started = [], 0, 0, time.monotonic()
        if trainer.step % settings.score_every == 0 or trainer.step == last:
            score = copy_score(trainer.model, scored, settings.bf16)
            entry["score"] = {kind: round(value, 3) for kind, value in score.items()}
        if len(entry) > 1:
            log.info(json.dumps(entry))
            with (folder / "train.jsonl").open("a", encoding="utf-8") as record:
                record.write(json.dumps(entry) + "\n")

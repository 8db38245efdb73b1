"""Train the pocket model: a tiny Llama that answers from the documentation in its context.

    python tools/train_pocket_model.py data         fetch wheels, extract documentation
    python tools/train_pocket_model.py tokenizer    train the BPE
    python tools/train_pocket_model.py train        train, or go on from the last checkpoint
    python tools/train_pocket_model.py export       write weights and configuration
    python tools/train_pocket_model.py eval         score the export, print the card's table

Everything between lies under `--work`; `--out` gets what the package ships. Needs torch,
transformers, tokenizers and safetensors. Steps are repeatable from `--seed`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pocket import card, evaluate, export, sources, spans
from pocket import tokenizer as bpe
from pocket.model import Shape
from pocket.packing import Encoder
from pocket.questions import FORMS, HEADINGS
from pocket.train import STAGES, Settings, Stage, Trainer, train

log = logging.getLogger("train_pocket_model")


def make_data(work: Path) -> None:
    sources.fetch(work / "wheels")
    counts = sources.extract(work / "wheels", work / "blocks")
    log.info("documented names: %s", json.dumps(counts))


def make_tokenizer(work: Path, vocab_size: int, seed: int) -> None:
    """Trained on a sample of the training blocks; questions and fixed answers weigh little."""
    rng = random.Random(seed)
    blocks = rng.sample(sources.load(work / "blocks" / "training.jsonl"), 12_000)
    texts = [
        f"### {b.path} ({b.package}=={b.version})\n{b.signature}\n\n{b.doc[:1200]}" for b in blocks
    ]
    forms = [form.format(x=" x ", p=" p ") for kind in FORMS.values() for form in kind]
    texts += (forms + list(HEADINGS) + [spans.ABSENT, spans.REQUIRED.format(parameter="p")]) * 200
    bpe.save(bpe.train(texts, vocab_size), work / "tokenizer")


def stages_from(text: str) -> tuple[Stage, ...]:
    """The built-in stages with other step counts, `"1200,1500,1800,1500"`."""
    if not text:
        return STAGES
    steps = [int(part) for part in text.split(",")]
    return tuple(replace(stage, steps=count) for stage, count in zip(STAGES, steps, strict=True))


def run_training(rank: int, args: argparse.Namespace) -> None:
    """One process of the training; all but the first are silent."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    torch.set_num_threads(args.threads)
    folder = args.work / "runs" / args.run
    if args.processes > 1:
        meeting = f"file://{(folder / 'meeting').resolve()}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=args.processes)
    settings = Settings(seed=args.seed, muon_rate=args.muon_rate, adam_rate=args.adam_rate)
    encoder = Encoder(bpe.load(args.work / "tokenizer"))
    trainer = Trainer(Shape(), settings, stages_from(args.steps), rank, args.processes)
    if (folder / "model.pt").exists():
        trainer.restore(folder / "model.pt")
        log.info("going on from step %d", trainer.step)
    blocks = sources.load(args.work / "blocks" / "training.jsonl")
    held_out = sources.load(args.work / "blocks" / "held_out.jsonl")
    train(trainer, encoder, blocks, held_out, folder)


def start_training(args: argparse.Namespace) -> None:
    folder = args.work / "runs" / args.run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    if args.processes == 1:
        run_training(0, args)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the others would live on
        start: Callable[..., object] = spawn
        start(run_training, (args,), nprocs=args.processes, daemon=True)


def run_eval(args: argparse.Namespace) -> None:
    """Score the export in `--out`; table to the standard output and the model card."""
    encoder = Encoder(bpe.load(args.out))
    blocks = sources.load(args.work / "blocks" / "held_out.jsonl")
    cases = list(evaluate.drawn_cases(blocks, encoder, args.per_cell, args.seed))
    if args.contexts.exists():
        cases += evaluate.record_cases(args.contexts, encoder, evaluate.LENGTHS[-1])
    scores = evaluate.evaluate(args.out, cases, args.work / "answers.jsonl")
    table = evaluate.table(scores)
    card.write(args.out, table, args.per_cell, args.note)
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("step", choices=("data", "tokenizer", "train", "export", "eval"))
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--out", type=Path, default=Path("src/ragfleet/pocket"))
    parser.add_argument("--run", default="main", help="name of the training run under --work")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="that share each training step")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", default="", help="steps of each stage, comma-separated")
    parser.add_argument("--contexts", type=Path, default=Path("examples/contexts.jsonl"))
    parser.add_argument("--per_cell", type=int, default=40, help="scored prompts per kind, length")
    parser.add_argument("--note", default="", help="what the card should add about this training")
    parser.add_argument("--muon_rate", type=float, default=Settings.muon_rate)
    parser.add_argument("--adam_rate", type=float, default=Settings.adam_rate)
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    if args.step == "data":
        make_data(args.work)
    elif args.step == "tokenizer":
        make_tokenizer(args.work, Shape.vocab_size, args.seed)
    elif args.step == "train":
        start_training(args)
    elif args.step == "export":
        tokenizer = args.work / "tokenizer"
        checkpoint = args.work / "runs" / args.run / "model.pt"
        difference = export.export(checkpoint, tokenizer, Encoder(bpe.load(tokenizer)), args.out)
        log.info("exported to %s, logits equal within %.1e", args.out, difference)
    else:
        run_eval(args)


if __name__ == "__main__":
    main()

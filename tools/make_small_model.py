"""Make a small model with random weights, for demos and tests: no download, a few seconds.

    python tools/make_small_model.py OUT [--arch qwen3 --hidden_size 64 --num_layers 2 …]

Writes a complete Hugging Face folder: config.json, model.safetensors, a byte-level BPE tokenizer
trained on the example contexts, a ChatML template and generation_config.json. Its answers are
noise, but everything around them is real. The same settings give the same bytes; a folder that
already holds a model made with the same settings is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "small_model.json"

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--arch", choices=("llama", "qwen2", "qwen3", "mistral"), default="llama")
    parser.add_argument("--hidden_size", type=int, default=64, help="multiple of 16")
    parser.add_argument("--head_dim", type=int, default=16, help="divides hidden_size")
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=2048, help="at least 300")
    parser.add_argument("--max_position_embeddings", type=int, default=8192)
    parser.add_argument(
        "--sliding_window", type=int, default=None, help="tokens each one sees (empty: all)"
    )
    parser.add_argument("--tie_word_embeddings", action=argparse.BooleanOptionalAction)
    # Large weights: with the usual 0.02 the next token hardly depends on the prompt, and near-ties
    # would make the comparison of two engines a matter of rounding.
    parser.add_argument("--initializer_range", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat_template", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--corpus",
        type=Path,
        default=ROOT / "examples" / "contexts.jsonl",
        help="JSONL of records that the tokenizer learns from",
    )
    args = parser.parse_args(argv)
    if args.hidden_size % 16 or args.hidden_size < 16:
        parser.error(f"--hidden_size {args.hidden_size}: it must be a multiple of 16")
    if args.head_dim < 2 or args.hidden_size % args.head_dim:
        parser.error(f"--head_dim {args.head_dim}: it must divide --hidden_size {args.hidden_size}")
    if args.vocab_size < 300:
        parser.error(f"--vocab_size {args.vocab_size}: bytes and special tokens need 300")
    if not args.corpus.is_file():
        parser.error(f"--corpus {args.corpus}: no such file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    corpus = args.corpus.read_bytes()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "corpus")}
    settings["corpus_sha256"] = hashlib.sha256(corpus).hexdigest()
    made_with = args.out / SETTINGS
    if made_with.is_file() and json.loads(made_with.read_text()) == settings:
        print(f"{args.out} already holds this model")
        return
    if args.out.exists() and not made_with.is_file() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out}: holds something else; name a new or empty folder")
    # Made beside the final place and renamed, so that an interrupted run leaves no half model.
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    vocab_size = write_tokenizer(partial, corpus, args)
    num_parameters = write_model(partial, vocab_size, args)
    write_json(partial / SETTINGS, settings)
    if args.out.exists():
        shutil.rmtree(args.out)
    partial.rename(args.out)
    print(f"{args.out}: {args.arch} of {num_parameters:,} random weights, {vocab_size} tokens")


def write_tokenizer(out: Path, corpus: bytes, args: argparse.Namespace) -> int:
    """tokenizer.json and its companions; returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts: list[str] = []
    for line in corpus.decode("utf-8").splitlines():
        if line.strip():
            record: dict[str, Any] = json.loads(line)
            texts += [str(record.get("query", "")), str(record.get("context", ""))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[PAD, BOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": args.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if args.chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(out / "tokenizer_config.json", config)
    return int(tokenizer.get_vocab_size())


def write_model(out: Path, vocab_size: int, args: argparse.Namespace) -> int:
    """config.json, generation_config.json and model.safetensors; returns the number of weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    num_heads = args.hidden_size // args.head_dim
    window = {"sliding_window": args.sliding_window} if args.arch == "mistral" else {}
    config = AutoConfig.for_model(
        args.arch,
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=args.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 2),
        head_dim=args.head_dim,
        max_position_embeddings=args.max_position_embeddings,
        initializer_range=args.initializer_range,
        tie_word_embeddings=bool(args.tie_word_embeddings),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
        dtype="float32",
        **window,
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

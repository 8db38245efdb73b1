"""The pocket model's tokenizer and its chat template.

Byte-level BPE whose pretokeniser is made for copying: a word has the same tokens after a space,
a dot or a bracket, because the space is a token of its own (a dozen function words excepted);
camelCase, underscores and digits are cut apart. Costs some tokens, saves the model from learning
that `order` and ` order` are one word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, CONTEXT, QUESTION, ANSWER, END = (
    "<|pad|>",
    "<|begin|>",
    "<|context|>",
    "<|question|>",
    "<|answer|>",
    "<|end|>",
)
SPECIAL = [PAD, BOS, CONTEXT, QUESTION, ANSWER, END]

PRETOKENS = (
    r" (?:the|of|is|to|in|and|or|for|be|with|this|that|are|will)(?![\p{L}\p{N}_])"
    r"|\p{Han}+|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\p{L}+|\p{N}"
    r"|\n+[ \t]*|, | +|-+|=+|#+|>+|\*+|~+|`+|:+|\.\.\.|[\s\S]"
)

# The system message is left out: it never changes what is right, and costs twenty tokens. The
# last "Question: " is cut off the user message, so a special token stands between the context
# (what many prompts share) and the question, and neither side's tokens depend on the other.
CHAT_TEMPLATE = (
    "{{- '" + BOS + "' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{%- set parts = ('\\n\\n' + message['content']).split('\\n\\nQuestion: ') %}"
    "{{- '"
    + CONTEXT
    + "' + (parts[:-1] | join('\\n\\nQuestion: ')).strip()"
    + " + '"
    + QUESTION
    + "' + parts[-1].strip() }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '" + ANSWER + "' + message['content'] + '" + END + "' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '" + ANSWER + "' }}{%- endif %}"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))

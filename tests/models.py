"""Small models for tests, and the plain generation that engines must equal."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed here: make test-vllm",
    ),
]
"""Marks for what runs vLLM."""
ROOT = Path(__file__).resolve().parent.parent


def small_model_tool() -> ModuleType:
    path = ROOT / "tools" / "make_small_model.py"
    spec = importlib.util.spec_from_file_location("make_small_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(out: Path, *flags: str) -> Path:
    """A complete model folder by tools/make_small_model.py."""
    small_model_tool().main([str(out), *flags])
    return out


def make_tokenizer(out: Path, *flags: str, texts: Sequence[str] = ()) -> Path:
    """Only the tokenizer files, learnt from `texts` (else from the examples), without torch."""
    tool = small_model_tool()
    args = tool.parse_args([str(out), *flags])
    out.mkdir(parents=True, exist_ok=True)
    corpus = "\n".join(json.dumps({"context": text}) for text in texts).encode()
    tool.write_tokenizer(out, corpus or args.corpus.read_bytes(), args)
    return out


def changed_copy(model_dir: Path, out: Path, **files: dict[str, Any] | None) -> Path:
    """A copy with keys of JSON files changed: `changed_copy(a, b, config={"x": 1})`."""
    shutil.copytree(model_dir, out)
    for name, changes in files.items():
        path = out / f"{name}.json"
        if changes is None:
            path.unlink()
            continue
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**value, **changes}))
    return out


def example_records(count: int) -> list[dict[str, Any]]:
    """`count` of the example records, of very different lengths, some of them Chinese."""
    with (ROOT / "examples" / "contexts.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    records.sort(key=lambda record: len(record["context"]))
    step = (len(records) - 1) / max(count - 1, 1)
    return [records[round(index * step)] for index in range(count)]


class Reference:
    """Batch size 1, greedy, nothing of ours in it: what every engine's tokens are compared with."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(1)  # as the engines under test
        self._model = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._model.eval()

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int]
    ) -> list[int]:
        """Generated ids, the end marker included if it came."""
        ids = self._torch.tensor([list(token_ids)])
        with self._torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(eos_ids),
                pad_token_id=0,
            )
        generated: list[int] = out[0, len(token_ids) :].tolist()
        return generated

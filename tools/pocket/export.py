"""From a checkpoint to what the package ships, and proof that both compute the same.

Weights are rounded to bfloat16 and stored so; computing in fp32 on them is exact, because every
bfloat16 value is an fp32 value.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pocket.model import Llama, Shape, plain_layout
from pocket.packing import Encoder
from pocket.tokenizer import BOS, END, PAD

MAX_BYTES = 16_000_000


def config_of(shape: Shape, encoder: Encoder) -> dict[str, object]:
    """`config.json` of a `LlamaForCausalLM` with the network's sizes."""
    special = encoder.special
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": special[BOS],
        "eos_token_id": special[END],
        "pad_token_id": special[PAD],
        "dtype": "bfloat16",
        "use_cache": True,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(checkpoint: Path, tokenizer_folder: Path, encoder: Encoder, out: Path) -> float:
    """Write weights, configuration and tokenizer to `out`; largest logit difference found.

    Raises:
        ValueError: the export disagrees with the trained network, or is too large to ship.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint, weights_only=True)
    shape = Shape(**state["shape"])
    weights = {name: weight.to(torch.bfloat16) for name, weight in state["model"].items()}
    note = {"format": "pt", "steps": str(state["step"]), "train_s": str(round(state["seconds"]))}
    save_file(weights, out / "model.safetensors", metadata=note)
    write_json(out / "config.json", config_of(shape, encoder))
    generation = {
        "bos_token_id": encoder.special[BOS],
        "eos_token_id": encoder.special[END],
        "pad_token_id": encoder.special[PAD],
        "do_sample": False,
    }
    write_json(out / "generation_config.json", generation)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, out / name)

    ours = Llama(shape)
    ours.load_state_dict({name: weight.float() for name, weight in weights.items()})
    theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(6, shape.vocab_size, (2, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).repeat(len(ids))
        states = ours.hidden_states(ids.flatten(), positions, plain_layout(*ids.shape))
        mine = ours.logits(states).view(*ids.shape, -1)
        difference = float((mine - theirs(ids).logits).abs().max())
    if difference > 1e-3:
        raise ValueError(f"logits of the export differ by {difference}: the mapping is wrong")
    for file in out.iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"{out} holds {size} bytes, more than {MAX_BYTES}: shrink the model")
    return difference

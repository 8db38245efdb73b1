"""A model's own operations in few: the same tokens, and what is something else stays."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuda_way import take_cudas_way
from driving import Make
from plain_fused import PLAIN, plain_gated, plain_rotate
from test_shared_prefix import answer, loop_of, prompt_sets
from torch import nn
from transformers.models.llama import modeling_llama

from models import Reference, make_model
from ragfleet.engines.shared_prefix import forward, loop, support
from ragfleet.engines.shared_prefix.fused_layers import Fused, FusedLayers

NEW = 8


def take_fused_way(monkeypatch: pytest.MonkeyPatch, fused: Fused = PLAIN) -> None:
    take_cudas_way(monkeypatch)
    way = dataclasses.replace(loop.way_of(None), fused=fused)  # type: ignore[arg-type]
    monkeypatch.setattr(loop, "way_of", lambda shape: way)


def tiny(**others: Any) -> Any:
    """A Llama whose weights are all drawn, those of norms too."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attention_bias=True,
        **others,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(torch.rand_like(weight) * 0.1)
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_tokens_of_plain_generation(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str
) -> None:
    asked = {"rotate": 0, "gated": 0}

    def rotate(*states: Any) -> Any:
        asked["rotate"] += 1
        return plain_rotate(*states)

    def gated(both: torch.Tensor) -> torch.Tensor:
        asked["gated"] += 1
        return plain_gated(both)

    take_fused_way(monkeypatch, Fused(rotate, gated))
    model = make_model(tmp_path / "m", "--arch", arch)
    reference = Reference(model)
    engine = start(model_dir=model, max_new_tokens=NEW, prefix_sharing="on")
    notes = loop_of(engine).notes
    assert not [note for note in notes if "the model's own" in note]
    for prompts in prompt_sets().values():
        for prompt, one in zip(prompts, answer(engine, prompts), strict=True):
            tokens = reference.generate(prompt, NEW, [3])
            assert list(one.token_ids) == [token for token in tokens if token != 3]
    assert min(asked.values()) > 20


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(6)[None]
    wanted = model(ids).logits
    rotation = modeling_llama.apply_rotary_pos_emb
    fused = FusedLayers(model, PLAIN)
    fused.use()
    with fused.passing():
        torch.testing.assert_close(model(ids).logits, wanted)
        assert modeling_llama.apply_rotary_pos_emb is not rotation
    assert modeling_llama.apply_rotary_pos_emb is rotation
    fused.undo()
    torch.testing.assert_close(model(ids).logits, wanted)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_no_weight_is_there_twice() -> None:
    model = tiny()
    FusedLayers(model, PLAIN)
    attention = model.model.layers[0].self_attn
    kept = {
        one.weight.untyped_storage().data_ptr()
        for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(kept) == 1


class OneMore(nn.Module):
    """As Gemma's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = nn.functional.rms_norm(x, (32,), 1 + self.weight, 1e-6)
        return out


class WithMean(OneMore):
    """As Cohere's norm, whose mean is subtracted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (32,), self.weight, eps=1e-6)


class Clamped(nn.Module):
    """As MLPs of some large models, within bounds that small numbers don't reach."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> Any:
        gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(nn.functional.silu(gate) * up)


def test_clamps_stay() -> None:
    model = tiny()
    model.model.layers[0].mlp = Clamped(model.model.layers[0].mlp)
    fused = FusedLayers(model, PLAIN)
    fused.use()
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.layers[1].mlp)


def test_hooks_and_tied_weights_stay() -> None:
    model = tiny()
    first, second = (layer.self_attn for layer in model.model.layers)
    first.k_proj.register_forward_hook(lambda *_: None)
    second.v_proj.weight = second.k_proj.weight
    FusedLayers(model, PLAIN).use()
    assert not [one for one in model.modules() if type(one) is nn.Linear and "forward" in vars(one)]


@pytest.mark.parametrize("norm", [OneMore, WithMean])
def test_what_computes_something_else_stays(norm: type[nn.Module]) -> None:
    model = tiny(hidden_act="gelu")
    layer = model.model.layers[1]
    layer.input_layernorm = norm()
    layer.self_attn.q_proj.forward = layer.self_attn.q_proj.forward  # somebody's hook
    fused = FusedLayers(model, Fused(lambda query, key, cos, sin: (query, key), plain_gated))
    fused.use()
    exchanged = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert "model.layers.0.input_layernorm" in exchanged
    assert "model.layers.0.self_attn.k_proj" in exchanged
    assert "model.layers.1.input_layernorm" not in exchanged
    assert "model.layers.1.self_attn.k_proj" not in exchanged
    assert not [name for name in exchanged if name.endswith("mlp")]
    assert fused.notes == ["MLPs are the model's own", "rotations are the model's own"]


def test_projections_of_different_inputs_are_not_mixed_up() -> None:
    model = tiny()
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 1, 3, 32)
    wanted = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)]
    FusedLayers(model, PLAIN).use()
    found = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)]
    torch.testing.assert_close(found, wanted)


def test_nothing_of_a_pass_is_kept() -> None:
    model = tiny()
    attention = model.model.layers[0].self_attn
    fused = FusedLayers(model, PLAIN)
    fused.use()
    x = torch.randn(1, 3, 32)
    with fused.passing():
        attention.q_proj(x)
    wanted = attention.k_proj(2 * x)
    x *= 2  # the same tensor with other numbers
    torch.testing.assert_close(attention.k_proj(x), wanted)


def test_a_wrong_exchange_costs_the_exchange_alone(
    start: Make, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    def looks_right(query: Any, key: Any, cos: Any, sin: Any) -> Any:
        found = plain_rotate(query, key, cos, sin)
        return found if query.shape[2] == 5 else (found[0] * 1.5, found[1])

    take_fused_way(monkeypatch, Fused(looks_right, plain_gated))
    engine = start(model_dir=small_model, max_new_tokens=NEW, prefix_sharing="on")
    notes = [note for note in loop_of(engine).notes if "the model's own" in note]
    assert len(notes) == 1
    assert "logits differ" in notes[0]
    prompts, reference = prompt_sets()["no head"][:3], Reference(small_model)
    for prompt, one in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, NEW, [3])
        assert list(one.token_ids) == [token for token in tokens if token != 3]


@pytest.mark.parametrize("where", ["layers", "keys and values"])
def test_too_little_memory_takes_plain_batches(
    start: Make, monkeypatch: pytest.MonkeyPatch, small_model: Path, where: str
) -> None:
    def full(*args: Any, **others: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    take_fused_way(monkeypatch)
    if where == "keys and values":
        way = dataclasses.replace(loop.way_of(None), make_cache=full)  # type: ignore[arg-type]
        monkeypatch.setattr(loop, "way_of", lambda shape: way)
        monkeypatch.setattr(support, "self_check", lambda *_: None)
    else:
        monkeypatch.setattr(forward, "trim_last_layer", full)
    engine = start(model_dir=small_model, max_new_tokens=NEW)
    assert "out of memory" in str(engine.start().degraded)
    assert len(answer(engine, prompt_sets()["no head"][:2])) == 2

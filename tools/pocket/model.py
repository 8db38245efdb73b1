"""A plain Llama for training, whose parameter names and shapes are those of `LlamaForCausalLM`.

Owns the network and nothing else: no data, no optimiser, no files. Training wants what the
library model lacks: several questions that share one context, tokens packed without padding, and
logits for chosen tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; counts, no units."""

    vocab_size: int = 2048
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 512
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Layout:
    """Where the `N` packed tokens stand: `B` contexts, and `M` tails that each continue one.

    `contexts` `[B, P]` and `tails` `[M, L]` index packed tokens, `keys` `[M, P + L]` those a tail
    may see (0 where there is none). `mask` `[M, 1, L, P + L]` is added to a tail's scores. `back`
    `[N]` finds each token in the two grids laid end to end, `B * P` places and then `M * L`.
    """

    contexts: Tensor
    tails: Tensor
    keys: Tensor
    mask: Tensor
    back: Tensor


def plain_layout(batch: int, length: int) -> Layout:
    """The layout of `batch` ordinary sequences of `length` tokens."""
    tokens = torch.arange(batch * length)
    none = torch.zeros(0, 0, dtype=torch.long)
    return Layout(tokens.view(batch, length), none, none, torch.zeros(0), tokens)


def rope_tables(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, `[N, 1, head_dim]` for `positions` `[N]`."""
    exponent = torch.arange(0, shape.head_dim, 2, device=positions.device).float() / shape.head_dim
    angles = positions.float()[:, None] / (shape.rope_theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[N, H, D]`, halves paired as Llama pairs them."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    watched: tuple[Tensor, Tensor] | None = None
    """Weights of contexts `[B, H, P, P]` and tails `[M, H, L, P + L]` of the last pass, if kept."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.keep_weights = False
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        q = rotate(self.q_proj(x).view(len(x), -1, self.shape.head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(len(x), -1, self.shape.head_dim), cos, sin)
        v = self.v_proj(x).view(len(x), -1, self.shape.head_dim)
        mask = causal(layout.contexts)
        out, seen = self.attend(q, k, v, layout.contexts, layout.contexts, mask)
        if len(layout.tails):
            tails, seen_by_tails = self.attend(q, k, v, layout.tails, layout.keys, layout.mask)
            out = torch.cat([out, tails])
            self.watched = (seen, seen_by_tails) if self.keep_weights else None
        projected: Tensor = self.o_proj(out.index_select(0, layout.back))
        return projected

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of each row of `queries` to the same row of `keys`, and its weights.

        Written out: on a CPU the backward pass of the fused one takes twice as long.
        """

        def grid(x: Tensor, index: Tensor) -> Tensor:
            return (
                x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            )

        group = self.shape.heads // self.shape.kv_heads
        keyed, valued = (grid(x, keys).repeat_interleave(group, dim=1) for x in (k, v))
        scores = grid(q, queries) * self.shape.head_dim**-0.5 @ keyed.transpose(-1, -2)
        weights = torch.softmax(scores + mask.to(scores.dtype), dim=-1, dtype=torch.float32)
        out = weights.to(valued.dtype) @ valued
        return out.transpose(1, 2).reshape(queries.numel(), -1), weights


def causal(rows: Tensor) -> Tensor:
    """The mask `[P, P]` of ordinary sequences `[B, P]`."""
    return torch.full((rows.shape[1], rows.shape[1]), float("-inf")).triu(1)


class Feedforward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = Feedforward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)


class Llama(nn.Module):
    """Tied embeddings; `state_dict()` is what `LlamaForCausalLM` loads, name for name."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                with torch.no_grad():
                    weight.mul_((2 * shape.layers) ** -0.5)

    def hidden_states(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Normed final states `[N, hidden]` of packed `ids` and `positions` `[N]`."""
        x = self.model.embed_tokens(ids)
        cos, sin = rope_tables(self.shape, positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, layout)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, states: Tensor) -> Tensor:
        """Scores over the vocabulary, `[..., vocab]`, by the tied embedding."""
        return F.linear(states, self.model.embed_tokens.weight)

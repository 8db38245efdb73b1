"""Initial weights that already hold copying circuits, so that training need not discover them.

Copying by induction needs two attention layers that only pay together, which is why it emerges
late from random weights. Here the first layer's heads start out looking one, two and three
tokens back, and later layers start with heads that look for the place where the last tokens
occurred before and copy what followed. All of it is only a start: every weight is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocket.model import Attention, Llama, Shape

CONSTANT_SHARE = 0.25  # of an embedding's squared norm, in one direction all tokens share
LOOK_BACK_LOGIT = 25.0  # score of the token a look-back head looks for
LOOK_BACK_PAIRS = 5  # fastest rotary pairs: they tell neighbours apart
MATCH_FROM_PAIR = 14  # slower pairs hardly turn within a context: they carry content
MATCH_GAIN = 2.0
QUIET = 0.1


def orthonormal_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    columns_first: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0]
    return columns_first.T.contiguous()


@torch.no_grad()
def plant(model: Llama, seed: int) -> None:
    """Overwrite the embedding and some heads of `model` with the circuits' starting weights."""
    shape = model.shape
    generator = torch.Generator().manual_seed(seed)
    basis = orthonormal_rows(shape.hidden, shape.hidden, generator)
    constant = basis[0]
    content = basis[1 : 1 + shape.head_dim]
    embedding = torch.randn(shape.vocab_size, shape.hidden, generator=generator)
    embedding -= (embedding @ constant)[:, None] * constant
    embedding /= embedding.norm(dim=1, keepdim=True)
    weight = (1 - CONSTANT_SHARE) ** 0.5 * embedding + CONSTANT_SHARE**0.5 * constant
    model.model.embed_tokens.weight.copy_(weight)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(QUIET)  # what is still random must not drown what is planted

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    first = attentions[0]
    places = []
    for head in range(min(3, shape.heads)):
        look_back(shape, first, head, head + 1, constant)
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        place = orthonormal_rows(shape.head_dim, shape.hidden, generator)
        first.v_proj.weight[rows] = content / 7  # about as strong as the embedding itself
        first.o_proj.weight[:, rows] = place.T
        places.append(place)
    for layer in attentions[1:4]:
        for head in range(min(3, shape.heads)):
            match(shape, layer, head, [content, *places], length=head + 1)
            rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            copied = orthonormal_rows(shape.head_dim, shape.hidden, generator)
            layer.v_proj.weight[rows] = copied / 7
            layer.o_proj.weight[:, rows] = copied.T


def look_back(shape: Shape, layer: Attention, head: int, distance: int, constant: Tensor) -> None:
    """Make `head` attend `distance` tokens back: a fixed key, a query turned by that distance."""
    half = shape.head_dim // 2
    pairs = torch.arange(LOOK_BACK_PAIRS)
    angles = distance * shape.rope_theta ** (-2 * pairs / shape.head_dim)
    seen = shape.hidden * CONSTANT_SHARE  # squared size of the constant part after the norm
    gain = (LOOK_BACK_LOGIT * shape.head_dim**0.5 / (LOOK_BACK_PAIRS * seen)) ** 0.5
    query, key = torch.zeros(shape.head_dim), torch.zeros(shape.head_dim)
    query[pairs], query[pairs + half] = gain * angles.cos(), -gain * angles.sin()
    key[pairs] = gain
    rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
    layer.q_proj.weight[rows] = query[:, None] * constant
    layer.k_proj.weight[rows] = key[:, None] * constant


def match(shape: Shape, layer: Attention, head: int, readers: list[Tensor], length: int) -> None:
    """Make `head` find where the last `length` tokens came before, one token further on.

    `readers[n]` reads the token `n` places back from the residual stream; the slow rotary pairs
    are dealt out to the tokens to be compared.
    """
    half = shape.head_dim // 2
    query, key = torch.zeros_like(readers[0]), torch.zeros_like(readers[0])
    for pair in range(MATCH_FROM_PAIR, half):
        back = pair % length
        for dim in (pair, pair + half):
            query[dim] = readers[back][dim] * MATCH_GAIN
            key[dim] = readers[back + 1][dim] * MATCH_GAIN
    rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
    layer.q_proj.weight[rows] = query
    layer.k_proj.weight[rows] = key

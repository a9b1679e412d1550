"""Defines Llama (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention and
SwiGLU."""

from __future__ import annotations

from math import gcd
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.shard import Column, Row, Split, Vocabulary
from meshwright.model.zoo.modules import (
    Embedding,
    Linear,
    LossHead,
    RMSNorm,
    heads_first,
    heads_last,
    without_autocast,
)


class TokenEmbedding(nn.Module):
    """Looks up token embeddings, (rows, sequence) to (rows, sequence, width); it is the first
    layer."""

    tensor_split: ClassVar[dict[str, Split]] = {"tokens": Vocabulary()}

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.tokens(tokens))


def apply_rotary(x: Tensor, head: int, base: float) -> Tensor:
    """Applies rotary position embedding (Su et al. 2021): (rows, sequence, heads * head) to (rows,
    heads, sequence, head).

    Feature i of a head's first half and feature i of its second half form a pair, which is rotated
    by the angle position * base^(-2 i / head).
    """
    x = x.view(*x.shape[:-1], -1, head)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x):
        steps = torch.arange(0, head, 2, device=x.device, dtype=exact) / head
        positions = torch.arange(x.shape[1], device=x.device, dtype=exact)
        angles = positions[:, None, None] * base**-steps
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    # The transpose comes last, so that the output of attention is contiguous for the product that
    # reads it.
    return turned.transpose(1, 2)


class Attention(nn.Module):
    """Computes causal grouped-query attention: each key-value head serves a group of query
    heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, head: int, base: float) -> None:
        super().__init__()
        self.head = head
        self.kv_heads = kv_heads
        self.groups = heads // kv_heads
        self.parts = (heads * head, kv_heads * head, kv_heads * head)
        self.base = base
        self.qkv = Linear(width, sum(self.parts), bias=False)
        self.out = Linear(heads * head, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        kv = qkv.shape[-1] // (self.groups + 2)
        q, k, v = torch.split(qkv, [self.groups * kv, kv, kv], dim=-1)
        q, k = apply_rotary(q, self.head, self.base), apply_rotary(k, self.head, self.base)
        grouped = self.groups > 1
        y = F.scaled_dot_product_attention(
            q, k, heads_first(v, self.head), is_causal=True, enable_gqa=grouped
        )
        return cast("Tensor", self.out(heads_last(y)))


class SwiGLU(nn.Module):
    """Computes down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return cast("Tensor", self.down(F.silu(gate) * up))


class Block(nn.Module):
    """Adds attention, then a feed-forward module of inner width `hidden`, to the residual stream.
    Each tensor-parallel rank holds whole groups of heads and a share of `hidden`."""

    def __init__(self, width: int, hidden: int, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width, eps=1e-5)
        self.attention = attention
        self.norm2 = RMSNorm(width, eps=1e-5)
        self.mlp = mlp
        self.tensor_units = gcd(attention.kv_heads, hidden)
        self.tensor_split: dict[str, Split] = {
            "attention.qkv": Column(parts=attention.parts),
            "attention.out": Row(),
            "mlp.gate_up": Column(parts=(hidden, hidden)),
            "mlp.down": Row(),
        }

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + cast("Tensor", self.mlp(self.norm2(x)))


class Llama(nn.Module):
    """Computes the mean loss of a Llama: forward(tokens, targets), both (rows, sequence)
    indices."""

    def __init__(  # noqa: PLR0913
        self,
        *,
        vocabulary: int,
        width: int,
        heads: int,
        kv_heads: int,
        layers: int,
        hidden: int,
        head: int | None = None,
        tied: bool = False,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        head = head or width // heads
        self.embedding = TokenEmbedding(vocabulary, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            attention = Attention(width, heads, kv_heads, head, base)
            self.blocks.append(Block(width, hidden, attention, SwiGLU(width, hidden)))
        self.head = LossHead(RMSNorm(width, eps=1e-5), width, vocabulary)
        if tied:
            self.head.linear.weight = self.embedding.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(x, targets))

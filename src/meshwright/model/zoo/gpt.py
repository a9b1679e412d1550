"""Defines GPT-2 (Radford et al. 2019): learned positions, pre-normalisation, GELU, and biases in
all linear maps but the output projection."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.shard import Column, Row, Split, Vocabulary
from meshwright.model.transformer.spec import AttentionKernel
from meshwright.model.zoo.attention import Scoring, attend
from meshwright.model.zoo.modules import (
    INIT_STD,
    Embedding,
    LayerNorm,
    Linear,
    LossHead,
    heads_first,
    heads_last,
)


class TokensAndPositions(nn.Module):
    """Adds token and position embeddings; it is the first layer."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = Embedding(vocabulary, width)
        self.positions = Embedding(positions, width)
        self.dropout = nn.Dropout(dropout)
        self.tensor_split: dict[str, Split] = {"tokens": Vocabulary()}

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return cast("Tensor", self.dropout(self.tokens(tokens) + self.positions(positions)))


class Attention(nn.Module):
    """Computes causal self-attention, over the heads that this tensor-parallel rank holds."""

    def __init__(
        self, width: int, heads: int, kernel: AttentionKernel, residual_std: float
    ) -> None:
        super().__init__()
        self.head = width // heads
        self.kernel = kernel
        self.tensor_rank: int | None = None
        self.qkv = Linear(width, 3 * width, bias=True)
        self.out = Linear(width, width, bias=True, std=residual_std)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_first(part, self.head) for part in self.qkv(x).chunk(3, dim=-1))
        scoring = Scoring(
            unfused=self.kernel.unfused, tensor_rank=self.tensor_rank,
            dropout=self.kernel.dropout if self.training else 0.0,
        )  # fmt: skip
        y = attend(q, k, v, causal=True, scoring=scoring)
        return cast("Tensor", self.out(heads_last(y)))


class MLP(nn.Module):
    """Applies two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden: int, residual_std: float) -> None:
        super().__init__()
        self.up = Linear(width, hidden, bias=True)
        self.down = Linear(hidden, width, bias=True, std=residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down(F.gelu(self.up(x), approximate="tanh")))


class Block(nn.Module):
    """Adds attention, then a feed-forward module, to the residual stream."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        residual_std: float,
        kernel: AttentionKernel | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attention = Attention(
            width, heads, kernel or AttentionKernel(dropout=dropout), residual_std
        )
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, hidden, residual_std)
        self.dropout = nn.Dropout(dropout)
        self.tensor_units = heads
        self.tensor_split: dict[str, Split] = {
            "attention.qkv": Column(parts=(width, width, width)),
            "attention.out": Row(),
            "mlp.up": Column(),
            "mlp.down": Row(),
        }

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + cast("Tensor", self.dropout(self.mlp(self.norm2(x))))


class GPT(nn.Module):
    """Computes the mean loss of a GPT-2: forward(tokens, targets), both (rows, sequence)
    indices."""

    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        width: int,
        heads: int,
        layers: int,
        hidden: int | None = None,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        # GPT-2 divides the initial weights of projections into the residual stream by the square
        # root of their number.
        residual_std = INIT_STD / (2 * layers) ** 0.5
        self.embedding = TokensAndPositions(vocabulary, positions, width, dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, dropout, residual_std) for _ in range(layers)
        )
        self.head = LossHead(LayerNorm(width), width, vocabulary)
        if tied:
            self.head.linear.weight = self.embedding.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(x, targets))

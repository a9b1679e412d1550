"""Defines a transformer shaped like a U-Net, with few wide tokens in the middle, many narrow tokens
at both ends, and long skip connections (Ronneberger et al. 2015; with attention, Petit et al.
2021).

At each level the encoder joins `FACTOR` neighbouring tokens (2 x 2 pixels of a picture read as
text) into one token of twice the width. The decoder expands them again, and joins the result with
the encoder's output of the same level. A pipeline cut near the middle therefore carries a small
tensor from layer to layer, and one skip tensor per level.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.transformer.spec import FUSED, AttentionKernel
from meshwright.model.zoo.gpt import Block, TokensAndPositions
from meshwright.model.zoo.modules import INIT_STD, LayerNorm, Linear, LossHead

FACTOR = 4
"""Number of tokens that are joined into one."""


class Shorten(nn.Module):
    """Joins four tokens into one: token j of the result is computed from tokens 4j - 3 to 4j, so
    that no token depends on later ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.join = Linear(FACTOR * width, 2 * width, bias=True, std=(FACTOR * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        count = -(-x.shape[1] // FACTOR)
        before = FACTOR - 1
        whole = F.pad(self.norm(x), (0, 0, before, FACTOR * count - before - x.shape[1]))
        return cast("Tensor", self.join(whole.view(x.shape[0], count, -1)))


class Lengthen(nn.Module):
    """Repeats each token four times with half the width, and joins the result with the encoder's
    output of the same level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(2 * width)
        self.norm_skip = LayerNorm(width)
        self.narrow = Linear(2 * width, width, bias=True, std=(2 * width) ** -0.5)
        self.join = Linear(2 * width, width, bias=True, std=(2 * width) ** -0.5)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        many = self.narrow(self.norm(x)).repeat_interleave(FACTOR, dim=1)[:, : skip.shape[1]]
        return cast("Tensor", self.join(torch.cat((many, self.norm_skip(skip)), dim=-1)))


class UTransformer(nn.Module):
    """Computes the mean loss of a U-Transformer: forward(tokens, targets), both (rows, sequence)
    indices.

    The encoder shortens the sequence and doubles the width `levels` times. `width` and `heads` are
    the numbers of features and heads at both ends. There are `layers` transformer blocks on each
    level of the encoder, in the middle, and on each level of the decoder.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        width: int,
        heads: int,
        layers: int,
        levels: int,
        kernel: AttentionKernel = FUSED,
    ) -> None:
        super().__init__()
        residual_std = INIT_STD / (2 * layers * (2 * levels + 1)) ** 0.5

        def blocks(level: int) -> list[Block]:
            inner = width << level
            return [
                Block(inner, heads << level, 4 * inner, 0.0, residual_std, kernel)
                for _ in range(layers)
            ]

        self.embedding = TokensAndPositions(vocabulary, positions, width, 0.0)
        self.encoder = nn.ModuleList()
        for level in range(levels):
            self.encoder.extend([*blocks(level), Shorten(width << level)])
        self.middle = nn.ModuleList(blocks(levels))
        self.decoder = nn.ModuleList()
        for level in reversed(range(levels)):
            self.decoder.extend([Lengthen(width << level), *blocks(level)])
        self.head = LossHead(LayerNorm(width), width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        skips = []
        for layer in self.encoder:
            if isinstance(layer, Shorten):
                skips.append(x)
            x = layer(x)
        for layer in self.middle:
            x = layer(x)
        for layer in self.decoder:
            x = layer(x, skips.pop()) if isinstance(layer, Lengthen) else layer(x)
        return cast("Tensor", self.head(x, targets))

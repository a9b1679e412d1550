"""Defines a U-shaped language model, with layers of very uneven cost and long skip connections.

Encoder layers reduce the number of features; decoder layers increase it again, and also read the
output of the encoder layer of the same width. A layer sees earlier tokens through a causal shift
(as in WaveNet).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.shard import Column, Row, Split
from meshwright.model.zoo.llama import TokenEmbedding
from meshwright.model.zoo.modules import LayerNorm, Linear, LossHead


class Mix(nn.Module):
    """Applies two linear maps to each token and the token `shift` places before it: `inputs`
    features to `outputs`, with inner width `hidden`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm = LayerNorm(inputs)
        self.up = Linear(2 * inputs, hidden, bias=True, std=(2 * inputs) ** -0.5)
        self.down = Linear(hidden, outputs, bias=True, std=hidden**-0.5)
        self.tensor_units = hidden
        self.tensor_split: dict[str, Split] = {"up": Column(), "down": Row()}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        before = F.pad(x, (0, 0, self.shift, 0))[:, : x.shape[1]]
        return cast("Tensor", self.down(F.gelu(self.up(torch.cat((x, before), dim=-1)))))


class Uneven(nn.Module):
    """Computes the mean loss of the U-shaped model: forward(tokens, targets), both (rows, sequence)
    indices.

    `widths` are the numbers of features from the embedding to the middle of the U. `hidden` are the
    inner widths of the encoder layers, then of the decoder layers: 2 * (len(widths) - 1) in all.
    """

    def __init__(
        self, *, vocabulary: int, widths: tuple[int, ...], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        depth = len(widths) - 1
        assert len(hidden) == 2 * depth
        self.embedding = TokenEmbedding(vocabulary, widths[0])
        self.encoder = nn.ModuleList(
            Mix(widths[i], hidden[i], widths[i + 1], 2**i) for i in range(depth)
        )
        inner = (widths[-1], *(2 * width for width in widths[-2:0:-1]))
        self.decoder = nn.ModuleList(
            Mix(inner[i], hidden[depth + i], widths[depth - 1 - i], 2 ** (depth + i))
            for i in range(depth)
        )
        self.head = LossHead(LayerNorm(2 * widths[0]), 2 * widths[0], vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        skips = []
        for layer in self.encoder:
            skips.append(x)
            x = layer(x)
        for layer in self.decoder:
            x = torch.cat((layer(x), skips.pop()), dim=-1)
        return cast("Tensor", self.head(x, targets))

"""Defines the modules that the models of the zoo share: linear maps, embeddings, norms and the
loss.

Every module with parameters sets them in `reset_parameters`, so that a layer built on the meta
device can be allocated and initialised on the device where it will run. Activations have one dtype
from the embedding to the logits: the autocast dtype if autocast is on, on every device type.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.shard import Split, VocabularyHead, VocabularyLoss

INIT_STD = 0.02
"""Standard deviation of initial weights, as in GPT-2."""


def activation_dtype(x: Tensor) -> torch.dtype:
    """Gives the dtype of activations: the autocast dtype if autocast is on, else that of `x`."""
    kind = x.device.type
    available = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Gives a context that switches autocast off on the device of `x`."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


class Linear(nn.Linear):
    """Applies a linear map whose initial weights are drawn from N(0, std) and whose initial bias is
    0."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Looks up rows of a table, initially drawn from N(0, INIT_STD); its output has the activation
    dtype."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, index: Tensor) -> Tensor:
        found = super().forward(index)
        return found.to(activation_dtype(found))


class LayerNorm(nn.LayerNorm):
    """Applies layer normalisation and keeps the dtype of its input (autocast would return
    float32)."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Applies root-mean-square normalisation and keeps the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight = cast("Tensor", self.weight).to(x.dtype)
            return F.rms_norm(x, tuple(self.normalized_shape), weight, self.eps)


class CrossEntropy(nn.Module):
    """Computes the mean cross entropy of logits (rows, sequence, vocabulary) and targets (rows,
    sequence)."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class LossHead(nn.Module):
    """Normalises, projects to the vocabulary and computes the mean loss; it is the last layer of a
    language model."""

    tensor_split: ClassVar[dict[str, Split]] = {
        "linear": VocabularyHead(),
        "loss": VocabularyLoss(),
    }

    def __init__(self, norm: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = norm
        self.linear = Linear(width, vocabulary, bias=False)
        self.loss = CrossEntropy()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return cast("Tensor", self.loss(self.linear(self.norm(x)), targets))


def heads_first(x: Tensor, head: int) -> Tensor:
    """Reshapes (rows, sequence, heads * head) to (rows, heads, sequence, head), for the heads that
    this tensor-parallel rank holds."""
    return x.view(*x.shape[:-1], -1, head).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """Reshapes (rows, heads, sequence, head) to (rows, sequence, heads * head)."""
    return x.transpose(1, 2).flatten(2)

"""Small models of which little is trained: low-rank adapters beside frozen weights, or the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from meshwright.model.shard import Column, Row, Split, Vocabulary
from meshwright.model.zoo.modules import Embedding, LayerNorm, LossHead


class Adapted(nn.Module):
    """A frozen linear map, and a trained one of low rank beside it (LoRA, Hu et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a = nn.Linear(inputs, rank, bias=False) if rank else None
        self.b = nn.Linear(rank, outputs, bias=False) if rank else None
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y if self.a is None or self.b is None else y + self.b(self.a(x))


class Block(nn.Module):
    """Two adapted maps around the residual stream."""

    def __init__(self, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.tensor_units = hidden
        self.tensor_split: dict[str, Split] = {"up.base": Column(), "down.base": Row()}
        if rank:
            self.tensor_split |= {"up.b": Column(), "down.a": Row()}
        self.norm = LayerNorm(width).requires_grad_(False)
        self.up = Adapted(width, hidden, rank)
        self.down = Adapted(hidden, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tuned(nn.Module):
    """forward(tokens, targets) gives the mean loss; adapters in some of the blocks, all else frozen
    but, if asked for, the head."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int = 16,
        hidden: int = 24,
        layers: int = 3,
        adapted: Iterable[int] = (),
        rank: int = 3,
        tied: bool = False,
        head: bool = False,
    ) -> None:
        super().__init__()
        own = set(adapted)
        self.embedding = Embedding(vocabulary, width).requires_grad_(False)
        self.blocks = nn.ModuleList(
            Block(width, hidden, rank if n in own else 0) for n in range(layers)
        )
        self.head = LossHead(LayerNorm(width), width, vocabulary).requires_grad_(head)
        if tied:
            self.embedding.weight = self.head.linear.weight
        if not self.head.linear.weight.is_meta:
            nn.init.normal_(self.head.linear.weight, std=0.7)
        self.tensor_split = {"embedding": Vocabulary()}

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x, targets)
        return loss


def tuned(vocabulary: int, *adapted: int, **others: bool) -> Callable[[], nn.Module]:
    """Makes a small one."""
    return lambda: Tuned(vocabulary=vocabulary, adapted=adapted, **others)


def tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """A batch without values."""
    whole = torch.empty(rows, length, dtype=torch.long, device="meta")
    return whole, whole

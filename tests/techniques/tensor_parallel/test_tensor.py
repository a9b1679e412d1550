"""Slices of parameters, and the vocabulary-parallel embedding and loss by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

from meshwright.errors import PlanError
from meshwright.layout.shares import cut, own_share
from meshwright.model.shard import (
    Column,
    Row,
    Split,
    Vocabulary,
    VocabularyHead,
    VocabularyLoss,
    tile_of,
)
from meshwright.runtime.slices import read_slices, write_slices
from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup, divide

pytestmark = pytest.mark.heavy

IGNORED = -100


@given(
    width=st.integers(1, 4),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.booleans(),
)
def test_slices_put_back_give_the_whole(width: int, parts: list[int], rows: bool) -> None:
    split: Split = Row() if rows else Column(parts=tuple(parts))
    shape = (3, sum(parts)) if rows else (sum(parts), 3)
    full = torch.arange(float(3 * sum(parts))).view(shape)
    again = torch.full_like(full, -1)
    for index in range(width):
        tile = tile_of(split, "weight", shape, own_share(width, index))
        write_slices(again, tile, read_slices(full, tile))
    assert torch.equal(again, full)


def whole() -> tuple[nn.Embedding, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 6, dtype=torch.float64)
    head = nn.Linear(6, 11, dtype=torch.float64)
    tokens, targets = torch.randint(0, 11, (2, 4, 5))
    targets[0, :2] = IGNORED
    return embedding, head, tokens, targets


def shared(_: int, width: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, and this rank's gradients of embedding, head and bias."""
    import torch.distributed as dist

    embedding, head, tokens, targets = whole()
    loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
    assert dist.group.WORLD is not None
    tensor_group = TensorParallelGroup(dist.group.WORLD, dist.get_rank(), width)
    splits = ((embedding, Vocabulary()), (head, VocabularyHead()), (loss, VocabularyLoss()))
    for module, split in splits:
        for name, full in list(module.named_parameters()):
            tile = tile_of(split, name, tuple(full.shape), own_share(width, tensor_group.index))
            setattr(module, name, nn.Parameter(read_slices(full.detach(), tile)))
        divide(module, "it", split, 11, tensor_group)
    value = loss(head(embedding(tokens)), targets)
    (3 * value).backward()
    assert embedding.weight.grad is not None
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    return value.item(), embedding.weight.grad, head.weight.grad, head.bias.grad


@pytest.mark.parametrize("width", [2, 3])
def test_an_uneven_vocabulary_gives_the_loss_and_gradients_of_the_whole(width: int) -> None:
    embedding, head, tokens, targets = whole()
    logits = head(embedding(tokens)).flatten(0, 1)
    value = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
    (3 * value).backward()
    wanted = (embedding.weight.grad, head.weight.grad, head.bias.grad)
    for rank, (loss, *gradients) in enumerate(run_ranks(width, shared, width)):
        assert loss == pytest.approx(value.item(), rel=1e-12)
        first, last = cut(11, own_share(width, rank))
        for found, full in zip(gradients, wanted, strict=True):
            assert full is not None
            torch.testing.assert_close(found, full[first:last], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("module", "split"),
    [
        (nn.Bilinear(2, 2, 2), Row()),
        (nn.Linear(2, 2), Vocabulary()),
        (nn.Embedding(4, 2, padding_idx=0), Vocabulary()),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(module: nn.Module, split: Split) -> None:
    tensor_group = TensorParallelGroup.__new__(TensorParallelGroup)
    with pytest.raises(PlanError, match=r"module mlp\.down: tensor_split: found"):
        divide(module, "mlp.down", split, 4, tensor_group)

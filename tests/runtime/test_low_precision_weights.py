"""16-bit copies of weights: one a step, numbers and gradients as autocast has them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from meshwright.model.symbolic import autocast
from meshwright.runtime.low_precision_weights import LowPrecisionWeights


def test_copies_serve_every_forward_and_give_the_gradients_of_autocast() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    ours = copy.deepcopy(plain)
    casts = LowPrecisionWeights([ours], "bf16")
    weights = list(ours.parameters())
    first, second = torch.randn(2, 3, 4)
    with autocast("bf16"):
        made = [ours(first), ours(second)]
        wanted = [plain(first), plain(second)]
    assert len({t.data_ptr() for t in casts.tensors()}) == len(weights) == 4
    assert [id(p) for p in ours.parameters()] == [id(p) for p in weights]
    for found, other in zip(made, wanted, strict=True):
        assert torch.equal(found, other)
        found.sum().backward()
        other.sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_copies_follow_the_weights_once_dropped() -> None:
    layer = nn.Linear(2, 2)
    casts = LowPrecisionWeights([layer], "bf16")
    with autocast("bf16"):
        before = layer(torch.ones(1, 2))
        with torch.no_grad():
            layer.weight.add_(1.0)
        casts.drop()
        assert not torch.equal(layer(torch.ones(1, 2)), before)


def test_full_precision_has_no_copies() -> None:
    assert LowPrecisionWeights([nn.Linear(2, 2)], "fp32").tensors() == []

"""Unfused attention computes what fused attention does; its dropout drops as many weights as it
says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from variants import LLAMA, VARIANTS

from meshwright.model.trace import trace
from meshwright.model.zoo.attention import Scoring, attend
from meshwright.model.zoo.build import from_language_model
from meshwright.model.zoo.dropout import drop, own_draws

CASES = {
    "causal": {"causal": True},
    "both ways": {"causal": False},
    "windows": {"causal": True, "window": 4},
    "windows, uneven": {"causal": True, "window": 5},
    "slopes": {"causal": True, "alibi": 4},
}


def inputs(kv_heads: int, value: int = 8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 12, 8), (2, kv_heads, 12, 8), (2, kv_heads, 12, value)]
    return [
        torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", CASES)
def test_unfused_attention_is_fused_attention(name: str, kv_heads: int) -> None:
    found = []
    for unfused in (False, True):
        given = inputs(kv_heads)
        made = attend(*given, scoring=Scoring(0.3, unfused=unfused), **CASES[name])
        made.square().sum().backward()
        found.append([made.detach(), *(each.grad for each in given)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_values_of_another_width_need_no_padding_when_unfused() -> None:
    given = inputs(4, value=5)
    one, other = (attend(*given, causal=True, scoring=Scoring(unfused=u)) for u in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unfused", [False, True])
def test_weights_are_dropped_in_training_alone(unfused: bool) -> None:
    variant = next(each for each in VARIANTS if each.name == "window")
    chosen = replace(variant, attention="unfused" if unfused else "fused", attention_dropout=0.5)
    torch.manual_seed(0)
    model = from_language_model(chosen).double()
    tokens = torch.randint(99, (2, 24))
    assert model(tokens, tokens) != model(tokens, tokens)
    model.eval()
    assert model(tokens, tokens) == model(tokens, tokens)


def test_as_many_are_dropped_as_asked_and_the_others_make_up_for_them() -> None:
    torch.manual_seed(0)
    dropped = drop(torch.ones(400, 400, dtype=torch.float64), 0.2)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.8}
    # 160,000 draws: 0.005 is five standard deviations.
    assert float((dropped == 0).double().mean()) == pytest.approx(0.2, abs=0.005)


def test_each_tensor_rank_draws_its_own_and_leaves_the_generator_alike() -> None:
    def drawn(rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        return drop(torch.ones(64), 0.5, rank), torch.rand(3)

    (first, after), (second, again), (same, _) = drawn(0), drawn(1), drawn(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, same)
    assert torch.equal(after, again)
    torch.manual_seed(7)
    with own_draws(torch.device("cpu"), None):
        undivided = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(undivided, torch.rand(3))


class Products(torch.nn.Module):
    """One product of two activations for each head, and one of activations and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(4, 8, 8, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.bmm(x.view(-1, 4, 8).transpose(0, 1), self.weight)
        return torch.bmm(heads, heads.transpose(1, 2)).square().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_of_two_activations_are_attention_and_those_with_weights_are_not(
    precision: str,
) -> None:
    batch = torch.empty(2, 32, device="meta")
    (layer,) = trace(torch.nn.Sequential(Products()), (batch,), precision).layers
    assert layer.attention_flops == layer.unfused_flops > 0
    assert layer.forward_flops == 2 * 4 * 8 * 8


def test_fused_attention_has_no_unfused_products() -> None:
    with torch.device("meta"):
        model = from_language_model(LLAMA)
    tokens = torch.empty(2, 24, dtype=torch.long, device="meta")
    graph = trace(model, (tokens, tokens), "bf16", divided=False)
    assert [layer.unfused_flops for layer in graph.layers] == [0.0] * 4
    assert graph.layers[1].attention_flops > 0

"""Frozen weights: alike on all who hold them from the start, cast once, and left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import VOCABULARY, Case, batch, pipeline
from ranks import run_ranks
from torch import nn

from adapters import tuned
from meshwright.model.symbolic import autocast
from meshwright.runtime.casts import Casts

STARTS = {
    "replicas without a sum": Case(
        model=tuned(VOCABULARY, 2), pipelines=(pipeline(2, 4, (2, "a b"), (3, "c")),)
    ),
    "replicas of unlike widths, a divided table that is tied": Case(
        model=tuned(VOCABULARY, 1, tied=True), pipelines=(pipeline(2, 4, (5, "a bc", (1, 3))),)
    ),
    "two pipelines": Case(
        model=tuned(VOCABULARY, 0),
        pipelines=(pipeline(2, 3, (3, "a"), (2, "b")), pipeline(1, 2, (5, "c"))),
    ),
}


def first_step(rank: int, name: str) -> tuple[float, dict[str, torch.Tensor] | None]:
    """From weights that every process draws by itself; with what rank 0 has of them."""
    from meshwright.runtime.engine import Engine

    case = STARTS[name]
    torch.manual_seed(rank)
    with Engine(
        case.model(),
        case.plan,
        inputs=batch(0),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        clip_norm=case.clip_norm,
    ) as engine:
        before = engine.parameters()
        kept = before and {each: value.clone() for each, value in before.items()}
        loss = engine.step(lambda a, b: tuple(t[a:b] for t in batch(0))).loss
        return loss, kept


@pytest.mark.parametrize("name", STARTS)
def test_all_who_hold_a_frozen_weight_start_with_the_first_ones_values(name: str) -> None:
    case = STARTS[name]
    ranks = run_ranks(case.world_size, first_step, name)
    weights = ranks[0][1]
    model = case.model().double()
    model.load_state_dict({**model.state_dict(), **weights})
    wanted = model(*batch(0)).item()
    for loss, _ in ranks:
        assert loss == pytest.approx(wanted, rel=1e-9)


def test_casts_of_frozen_weights_outlast_a_step_and_follow_a_change() -> None:
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    casts = Casts([nn.Sequential(frozen, trained)], "bf16")
    x = torch.ones(1, 2)
    with autocast("bf16"):
        trained(frozen(x))
        before = {t.data_ptr() for t in casts.tensors()}
        casts.drop()
        assert len(casts._copies) == 2
        trained(frozen(x))
        assert len(before & {t.data_ptr() for t in casts.tensors()}) >= 2
        plain = copy.deepcopy(frozen)
        for layer in (frozen, plain):
            with torch.no_grad():
                layer.weight.add_(1.0)
        assert torch.equal(frozen(x), nn.Linear.forward(plain, x))

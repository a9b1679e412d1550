"""Whatever the plan, training equals one plain PyTorch loop on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import CASES, ROWS, SEQUENCE, Case, batch
from pool import Pool
from torch import Tensor, nn

from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.runtime.run_folder import TrainingOptions

STEPS = 10
LIMIT_SECONDS = 120.0
RATE = 1e-2
SMALL_BUCKETS = 3000
"""Bytes: even these small models have several."""


def factor(step: int) -> float:
    """A learning rate that rises and falls."""
    return (step + 1) / 5 if step < 5 else 1 - step / 40


def built(case: Case) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(5)
    return case.model()


@cache
def graph(model: Callable[[], nn.Module]) -> LayerGraph:
    """The layers of a model: traced once here, and not by every rank of every plan."""
    return trace(model().double(), batch(0), "fp64", SEQUENCE, "any")


def trained(case: Case, graph: LayerGraph) -> tuple[list[tuple[float, float]], Any]:
    """Loss and norm of every step, and on rank 0 the parameters at the end."""
    from meshwright.runtime.engine import Engine

    with Engine(
        built(case),
        case.plan,
        inputs=batch(0),
        graph=graph,
        optimizer=lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        options=TrainingOptions(clip_norm=case.clip_norm),
        learning_rate=factor,
        bucket_bytes=SMALL_BUCKETS,
    ) as engine:
        results = []
        for step in range(STEPS):
            whole = batch(step % 2)
            results.append(engine.step(lambda a, b, whole=whole: tuple(t[a:b] for t in whole)))
        return [(r.loss, r.grad_norm) for r in results], engine.parameters()


def play(_: int, name: str, graph: LayerGraph) -> tuple[list[tuple[float, float]], Any]:
    """One case, on one of its ranks."""
    return trained(CASES[name], graph)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """The processes that play all plans, one after another."""
    with Pool(LIMIT_SECONDS) as ranks:
        yield ranks


def reference(case: Case) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Nothing but PyTorch."""
    model = built(case).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(*batch(step % 2))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        losses.append((loss.item(), norm.item()))
        optimizer.step()
        scheduler.step()
    return losses, dict(model.named_parameters())


def exact(numbers: list[tuple[float, float]]) -> Tensor:
    """In the precision that the comparison needs."""
    return torch.tensor(numbers, dtype=torch.float64)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.world_size >= 3 else [])
        for name, case in CASES.items()
    ],
)
def test_training_equals_one_process(pool: Pool, name: str) -> None:
    case = CASES[name]
    ranks = pool.run(case.world_size, play, name, graph(case.model))
    wanted, weights = reference(replace(case, model=case.equals or case.model))
    for found, _ in ranks:
        assert exact(found) == pytest.approx(exact(wanted), rel=1e-9)
    parameters = ranks[0][1]
    assert parameters.keys() == weights.keys()
    for each, value in weights.items():
        assert relative(parameters[each], value.detach()) < 1e-9, each
    assert wanted[-1][0] < 0.98 * wanted[0][0], "nothing was learnt, so nothing was compared"
    assert max(norm for _, norm in wanted) > case.clip_norm, "clipping was never in use"


def test_rows_add_up() -> None:
    """Every case covers the same global batch."""
    for case in CASES.values():
        assert sum(p.rows * p.micro_batches for p in case.pipelines) == ROWS

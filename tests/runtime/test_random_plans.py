"""Whatever legal plan: training equals one plain PyTorch loop. Plans drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import SEQUENCE, VOCABULARY, Shared, gpt, llama, mixtral, uneven
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pool import Pool
from torch import Tensor, nn

from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.plan.spec import Plan
from meshwright.runtime.run_folder import TrainingOptions
from soaks import tenth
from strategies import plans

RANKS = 4
STEPS = 10
LIMIT_SECONDS = 120.0

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "gpt, tied": (gpt, (1, 2, 4)),
    "gpt": (lambda: gpt(tied=False, width=12, heads=6), (1, 2, 3)),
    "llama": (llama, (1, 2)),
    "mixtral": (mixtral, (1, 2)),
    "uneven": (uneven, (1, 2, 4)),
    "shared": (Shared, (1, 2)),
}
"""Models, and the tensor widths that divide them."""


@dataclass(frozen=True)
class Drawn:
    """A plan for one of the models."""

    model: str
    plan: Plan
    clip_norm: float


@cache
def graph(name: str) -> LayerGraph:
    return trace(MODELS[name][0](), batch(0, 1), "fp64", SEQUENCE, name)


def batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, VOCABULARY, (rows, SEQUENCE + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    name = draw(st.sampled_from(sorted(MODELS)))
    plan = draw(plans(graph(name), max_devices=RANKS, max_rows=4, widths=MODELS[name][1]))
    job = replace(plan.job, precision="fp64", sequence=SEQUENCE)
    return Drawn(name, replace(plan, job=job), draw(st.sampled_from([0.1, 1e6])))


def built(case: Drawn) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[case.model][0]()


CLOSE = 1e-8
"""Relative; rounding alone comes to a few 1e-9 in twenty steps of the worst of many plans."""

EPS = 1e-4
"""Adam divides a gradient that is nearly zero by its own size: with the usual 1e-8, rounding in the
last bit grows a million times in twenty steps of some plans."""


def play(_: int, case: Drawn, graph: LayerGraph) -> tuple[list[tuple[float, float]], Any]:
    """Losses and norms on every rank, and the parameters on rank 0."""
    from meshwright.runtime.engine import Engine

    rows = case.plan.job.global_batch
    with Engine(
        built(case),
        case.plan,
        inputs=batch(0, rows),
        graph=graph,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, eps=EPS),
        options=TrainingOptions(clip_norm=case.clip_norm),
        bucket_bytes=3000,
    ) as engine:
        found = []
        for step in range(STEPS):
            whole = batch(step % 2, rows)
            result = engine.step(lambda a, b, whole=whole: tuple(t[a:b] for t in whole))
            found.append((result.loss, result.grad_norm))
        return found, engine.parameters()


def reference(case: Drawn) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    model = built(case).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(*batch(step % 2, case.plan.job.global_batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        found.append((loss.item(), norm.item()))
        optimizer.step()
    return found, {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(LIMIT_SECONDS) as ranks:
        yield ranks


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=tenth(300), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(case=drawn())
def test_any_legal_plan_trains_as_one_process_does(pool: Pool, case: Drawn) -> None:
    wanted, weights = reference(case)
    ranks = pool.run(len(case.plan.devices), play, case, graph(case.model))
    for found, _ in ranks:
        assert torch.tensor(found, dtype=torch.float64) == pytest.approx(
            torch.tensor(wanted, dtype=torch.float64), rel=CLOSE
        )
    parameters = ranks[0][1]
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        error = (parameters[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error < CLOSE, name

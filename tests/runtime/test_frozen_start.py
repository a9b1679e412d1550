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
from meshwright.runtime.low_precision_weights import LowPrecisionWeights
from meshwright.runtime.run_folder import TrainingOptions

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
        options=TrainingOptions(clip_norm=case.clip_norm),
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


EARLY = {
    "a pipeline with a stage that trains nothing, and a replica": Case(
        model=tuned(VOCABULARY, 2),
        pipelines=(pipeline(2, 2, (3, "a"), (2, "b")), pipeline(2, 2, (5, "c"))),
    ),
    "in two parts": Case(
        model=tuned(VOCABULARY, 0),
        pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),),
        schedule="1f1b-2bp",
    ),
}
STEPS, RATE = 3, 0.1


def without_clipping(_: int, name: str) -> list[tuple[float, float]]:
    """Loss and norm of some steps whose weights change bucket by bucket."""
    from meshwright.runtime.engine import Engine

    case = EARLY[name]
    torch.manual_seed(5)
    with Engine(
        case.model(),
        case.plan,
        inputs=batch(0),
        optimizer=lambda p: torch.optim.SGD(p, lr=RATE),
        options=TrainingOptions(clip_norm=0),
        bucket_bytes=256,
    ) as engine:
        steps = [engine.step(lambda a, b: tuple(t[a:b] for t in batch(0))) for _ in range(STEPS)]
        return [(step.loss, step.grad_norm) for step in steps]


@pytest.mark.parametrize("name", EARLY)
def test_without_clipping_frozen_layers_are_updated_by_nobody(name: str) -> None:
    torch.manual_seed(5)
    model = EARLY[name].model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    wanted = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(*batch(0))
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        wanted.append((loss.item(), norm.item()))
        optimizer.step()
    for found in run_ranks(EARLY[name].world_size, without_clipping, name):
        assert torch.tensor(found, dtype=torch.float64) == pytest.approx(
            torch.tensor(wanted, dtype=torch.float64), rel=1e-9
        )


LOW = Case(
    model=tuned(VOCABULARY, 2),
    pipelines=(pipeline(4, 2, (2, "a"), (3, "b again")),),
    precision="bf16",
)


def recorded(_: int) -> tuple[list[float], list[int], int, float] | None:
    """Losses in bf16 with headers on all messages; of a recorded step, the bytes of both ranks at
    its start."""
    from meshwright.runtime.engine import Engine

    torch.manual_seed(5)
    with Engine(
        LOW.model(),
        LOW.plan,
        inputs=batch(0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        options=TrainingOptions(clip_norm=0, debug=True),
    ) as engine:
        rows = [t.clone() for t in batch(0)]
        losses = [engine.step(lambda a, b: tuple(t[a:b] for t in rows)).loss for _ in range(STEPS)]
        _, timeline = engine.record(lambda a, b: tuple(t[a:b] for t in rows))
        if timeline is None:
            return None
        first = [min(m.bytes for m in timeline.memory if m.rank == rank) for rank in range(2)]
        layers = engine.model.layers[:2]
        numbers = sum(x.frozen_parameters for x in layers)
        return losses, first, numbers, sum(x.cast_frozen for x in layers)


def test_a_stage_that_trains_nothing_holds_weights_and_casts_alone() -> None:
    losses, bytes_at_start, numbers, casts = run_ranks(2, recorded)[0]
    assert losses[-1] < losses[0]
    assert bytes_at_start[0] == 4 * numbers + 2 * casts


def test_casts_of_frozen_weights_outlast_a_step_and_follow_a_change() -> None:
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    casts = LowPrecisionWeights([nn.Sequential(frozen, trained)], "bf16")
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

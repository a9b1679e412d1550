"""Weights and optimizer states of ranks, box by box: whole in any plan, and moved to any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, VOCABULARY, Case, batch, divided, gpt, pipeline, plain
from pool import Pool
from torch import Tensor, nn

from adapters import tuned
from meshwright.errors import TrainingError
from meshwright.layout.boxes import Box, lengths, whole
from meshwright.layout.tiles import Layout, holders_of
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.slices import box_index

Found = dict[tuple[str, str], list[tuple[Box, Tensor]]]
"""Boxes and their values, by parameter and kind."""
Full = dict[tuple[str, str], Tensor]

STEPS, RATE, LIMIT_SECONDS = 2, 1e-2, 120.0
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def adapted() -> nn.Module:
    """Frozen but for low-rank adapters; the embedding's table is the head's too."""
    return tuned(VOCABULARY, 1, tied=True)()


ONE = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),))
DATA = Case(model=gpt, pipelines=(divided(pipeline(2, 4, (5, "a b"))),))
TENSOR = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "ab"), (3, "cd")),))
BOTH = CASES["dp2 tp2, first stage's states divided, tied"]
UNLIKE = Case(model=plain, pipelines=(pipeline(2, 4, (5, "a bc", (1, 3))),))
VIRTUAL = CASES["dp2 pp2 zb-v, states divided, tied"]
TUNED = Case(model=adapted, pipelines=(pipeline(2, 4, (5, "a bc", (1, 3))),))


def engine_of(case: Case) -> Any:
    from meshwright.runtime.engine import Engine

    torch.manual_seed(5)
    return Engine(
        case.model(),
        case.plan,
        inputs=batch(0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        options=TrainingOptions(clip_norm=case.clip_norm),
        bucket_bytes=3000,
    )


def train(engine: Any, first: int) -> None:
    for step in range(first, first + STEPS):
        engine.step(lambda a, b, step=step: tuple(t[a:b] for t in batch(step)))


def states_after(_: int, case: Case, resumed: Full | None) -> tuple[Found, dict[Any, Layout]]:
    """All that a rank holds after some steps, the first ones or (with states to resume from) the
    next; and what it says all ranks hold."""
    with engine_of(case) as engine:
        state = engine.state()
        if resumed is not None:
            names = [name for name in state.parameters if "weight" in state.kinds(name)]
            for name in names:
                for (of, kind), full in resumed.items():
                    boxes = state.layout(name, kind).get(engine.rank, ()) if of == name else ()
                    for box in boxes if full.dim() else [()] * bool(boxes):
                        state.write(name, box, full[box_index(box)], kind)
        train(engine, 0 if resumed is None else STEPS)
        found: Found = {
            (name, kind): [(box, view.clone()) for box, view in state.pieces(name, kind)]
            for name in state.parameters
            for kind in state.kinds(name)
        }
        layouts = {
            (name, kind): state.layout(name, kind)
            for name, parameter in state.parameters.items()
            for kind in (KINDS if parameter.trained else KINDS[:1])
        }
        return found, layouts


def alone(case: Case, steps: int) -> Full:
    """Nothing but PyTorch."""
    torch.manual_seed(5)
    model = case.model().double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(steps):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        optimizer.step()
    found = {(name, "weight"): p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {(name, kind): v for kind, v in optimizer.state.get(parameter, {}).items()}
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(LIMIT_SECONDS) as ranks:
        yield ranks


def assembled(ranks: list[tuple[Found, dict[Any, Layout]]], wanted: Full) -> Full:
    """Every tensor put together from the boxes that are to be read; checks that all ranks hold what
    the layouts say, and that copies are equal."""
    full: Full = {}
    held = [found for found, _ in ranks]
    for (name, kind), value in wanted.items():
        full[name, kind] = torch.full_like(value, torch.nan)
        layout = {rank: tuple(box for box, _ in found[name, kind])
                  for rank, found in enumerate(held) if (name, kind) in found}  # fmt: skip
        if value.dim():
            for _, layouts in ranks:
                said = layouts[name, kind]
                assert {rank: set(tile) for rank, tile in said.items() if tile} == {
                    rank: set(tile) for rank, tile in layout.items() if tile
                }
            layout = {rank: layout[rank] for rank in layouts[name, kind] if rank in layout}
        for box, holders in holders_of(layout).items():
            copies = [part for rank in holders for part in values(held[rank][name, kind], box)]
            assert len(copies) == len(holders)
            assert all(torch.equal(copy, copies[0]) for copy in copies)
            full[name, kind][box_index(box)] = copies[0]
    return full


def values(pieces: list[tuple[Box, Tensor]], box: Box) -> list[Tensor]:
    """A box out of the larger one that a rank holds."""
    found = []
    for piece, value in pieces:
        inner = tuple((a - c, b - c) for (a, b), (c, _) in zip(box, piece, strict=True))
        if all(a >= 0 and b <= n for (a, b), n in zip(inner, value.shape, strict=True)):
            found.append(value[box_index(inner)])
    return found


def compare(found: Full, wanted: Full) -> None:
    assert found.keys() == wanted.keys()
    for each, value in wanted.items():
        error = (found[each] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error < 1e-9, each


def slow_if_many(*cases: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if max(case.world_size for case in cases) > 2 else []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(a, b, marks=slow_if_many(a, b), id=name)
        for name, (a, b) in {
            "one process to divided states": (ONE, DATA),
            "divided states to tp2 pp2": (DATA, TENSOR),
            "tp2 pp2 to dp2 tp2, states divided in a stage": (TENSOR, BOTH),
            "dp2 tp2 to dp2 pp2 zb-v, states divided": (BOTH, VIRTUAL),
            "unlike tensor widths, and again": (UNLIKE, UNLIKE),
            "frozen and tied, unlike tensor widths": (TUNED, TUNED),
        }.items()
    ],
)
def test_states_are_those_of_one_process_and_resume_under_another_plan(
    pool: Pool, source: Case, target: Case
) -> None:
    """Read under one plan after two steps, written under another, and trained on there."""
    wanted = alone(source, STEPS)
    full = assembled(pool.run(source.world_size, states_after, source, None), wanted)
    compare(full, wanted)
    later = alone(source, 2 * STEPS)
    compare(assembled(pool.run(target.world_size, states_after, target, full), later), later)


def refused(rank: int) -> list[str]:
    """What is said about boxes that this rank does not hold."""
    said = []
    with engine_of(DATA) as engine:
        train(engine, 0)
        state = engine.state()
        name = next(n for n in state.parameters if len(state.layout(n, "exp_avg")[rank]) > 0)
        shape = state.parameters[name].shape
        assert torch.equal(
            state.read(name, whole(shape)), engine._own.local_parameters[0].parameter
        )
        for kind, box in (("exp_avg", whole(shape)), ("momentum", whole(shape))):
            try:
                state.read(name, box, kind)
            except TrainingError as error:
                said.append(str(error))
        (box, *_) = state.layout(name, "exp_avg")[rank]
        state.write(name, box, torch.ones(lengths(box)), "exp_avg")
        assert (state.read(name, box, "exp_avg") == 1).all()
    return said


def test_a_box_that_is_not_all_here_is_refused_by_name(pool: Pool) -> None:
    for part, nothing in pool.run(2, refused):
        assert "exp_avg" in part
        assert "wanted all of" in part
        assert "momentum: found nothing" in nothing

"""Boundaries between stages of any widths, in every kind."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.layout.shares import Share
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import StagePlacement, stage_placements
from meshwright.plan.spec import BoundaryKind, Pipeline, Plan, Stage
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import format_program, parse_program
from meshwright.program.operations import Op
from meshwright.techniques.pipeline_parallel.rows import boundary_moves, gathered
from worlds import divided, in_a_row, layer, plan_by_hand

KINDS: tuple[BoundaryKind, ...] = ("direct", "scatter_gather", "broadcast")
ROWS = 6


@st.composite
def plans(draw: st.DrawFn, kind: BoundaryKind | None = None) -> Plan:
    """Two or three stages of any data and tensor widths, and any shares of rows."""
    kind = kind or draw(st.sampled_from(KINDS))
    taken, stages = count(), []
    for s in range(draw(st.integers(2, 3))):
        data, tensor = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        ends = draw(st.sets(st.integers(1, ROWS - 1), min_size=data - 1, max_size=data - 1))
        cuts = [0, *sorted(ends), ROWS]
        stages.append(
            Stage(
                layers=(s, s + 1),
                devices=tuple(
                    tuple(f"n:{next(taken)}" for _ in range(tensor)) for _ in range(data)
                ),
                rows=tuple(b - a for a, b in pairwise(cuts)),
                boundary=kind if s else None,
            )
        )
    return plan_by_hand(Pipeline(micro_batches=2, rows=ROWS, stages=tuple(stages)))


def graph(layers: int) -> LayerGraph:
    return in_a_row((divided(layer(), units=12),) * layers, cut_bytes=120.0)


def holders(stage: StagePlacement) -> dict[int, tuple[int, int]]:
    return {placement.rank: placement.rows for placement in stage.mesh.members}


@given(plans())
def test_every_number_arrives_exactly_once(plan: Plan) -> None:
    """After the gathers, on every rank; and from a rank that has it."""
    stages = stage_placements(plan)
    for source, target in ((stages[0], stages[1]), (stages[1], stages[0])):
        moves = boundary_moves(source, target, stages[1].boundary)
        got: dict[int, list[tuple[int, int]]] = {rank: [] for rank in holders(target)}
        for move in moves:
            first, last = holders(source)[move.source]
            assert first <= move.rows[0] < move.rows[1] <= last
            fine = 720
            share = move.part or Share(first=0, last=1, of=1)
            a, b, of = share.first, share.last, share.of
            cells = [
                (r, c) for r in range(*move.rows) for c in range(a * fine // of, b * fine // of)
            ]
            together = [ranks for rows, ranks in gathered(moves) if rows == move.rows]
            ranks = together[0] if together and move.part else (move.target,)
            assert move.target in ranks
            for rank in ranks:
                got[rank] += cells
        for rank, rows in holders(target).items():
            assert sorted(got[rank]) == [(r, c) for r in range(*rows) for c in range(720)]


@given(plans())
def test_programs_are_sound_and_survive_as_text(plan: Plan) -> None:
    program = compile_plan(plan, graph(len(plan.pipelines[0].stages)))
    check_program(program)
    assert parse_program(format_program(program)) == program


@given(plans("scatter_gather"))
def test_scattered_bytes_cross_a_cut_once(plan: Plan) -> None:
    """What a replica receives in all is what one of its ranks needs."""
    program = compile_plan(plan, graph(len(plan.pipelines[0].stages)))
    for stage in stage_placements(plan):
        for replica in stage.mesh.groups("tensor"):
            for op in (Op.RECV_F, Op.RECV_B):
                found = [
                    i for placement in replica for i in program.ranks[placement.rank] if i.op is op
                ]
                rows = replica[0].rows[1] - replica[0].rows[0]
                at_all = not (stage.is_first if op is Op.RECV_F else stage.is_last)
                assert sum(i.bytes for i in found) == 2 * 120 * rows * at_all


@pytest.mark.parametrize("kind", KINDS)
def test_gathers_stand_right_before_their_reader(kind: BoundaryKind) -> None:
    stages = (
        Stage(layers=(0, 1), devices=(("n:0",),)),
        Stage(layers=(1, 2), devices=(("n:1", "n:2"),), boundary=kind),
    )
    plan = plan_by_hand(Pipeline(micro_batches=2, rows=ROWS, stages=stages))
    own = compile_plan(plan, graph(2)).ranks[1]
    found = [k for k, i in enumerate(own) if i.op.kind == "collective" and i.op.reads]
    assert len(found) == (2 if kind == "scatter_gather" else 0)
    assert all(own[k + 1].op is Op.FORWARD for k in found)
    assert all(own[k + 1].micro_batch == own[k].micro_batch for k in found)
    receive = next(i for i in own if i.op is Op.RECV_F)
    assert receive.part == (Share(first=0, last=1, of=2) if kind == "scatter_gather" else None)
    assert receive.ranks == ((0, 1, 2) if kind == "broadcast" else ())

"""A plan in one line says what tells it from others."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plan.ranks import (
    describe_plan,
    first_row,
    row_intervals,
    stage_placements,
)
from meshwright.plan.spec import Pipeline, Plan, Stage
from worlds import plan_by_hand


def plan(rows: tuple[int, ...] | None) -> Plan:
    stage = Stage(layers=(0, 3), devices=(("a:0",), ("a:1",)), rows=rows)
    return plan_by_hand(Pipeline(micro_batches=1, rows=8, stages=(stage,)))


def test_unlike_tensor_widths_are_told():
    ragged = Stage(layers=(0, 3), devices=(("a:0", "a:1"), ("a:2",)))
    one = plan(None)
    pipelines = (replace(one.pipelines[0], stages=(ragged,)),)
    assert describe_plan(replace(one, pipelines=pipelines)) == "dp2 tp2+1 pp1 [3] 1x8 1f1b"


def test_unequal_rows_are_told_and_equal_ones_are_not():
    assert describe_plan(plan(None)) == "dp2 tp1 pp1 [3] 1x8 1f1b"
    assert describe_plan(plan((4, 4))) == "dp2 tp1 pp1 [3] 1x8 1f1b"
    assert describe_plan(plan((7, 1))) == "dp2 tp1 pp1 [3] 1x7+1 1f1b"


def test_pipelines_take_the_rows_of_the_batch_one_after_another():
    """Three micro-batches of four rows, then two of five: rows 0 to 11, and 12 to 21."""
    first = Pipeline(micro_batches=3, rows=4, stages=plan(None).pipelines[0].stages)
    both = replace(plan(None), pipelines=(first, replace(first, micro_batches=2, rows=5)))
    begins = [[first_row(both, p, m) for m in range(count)] for p, count in ((0, 3), (1, 2))]
    assert begins == [[0, 4, 8], [12, 17]]


def test_replicas_take_the_rows_of_a_micro_batch_one_after_another():
    (stage,) = plan((7, 1)).pipelines[0].stages
    assert row_intervals(stage, 8) == ((0, 7), (7, 8))
    assert row_intervals(replace(stage, rows=None), 8) == ((0, 4), (4, 8))


def test_every_device_has_its_seat():
    """Two pipelines of two stages; ranks are places in the list of devices."""
    first = Stage(layers=(0, 1), devices=(("a:2", "a:0"), ("a:1", "a:3")), rows=(3, 1))
    last = Stage(layers=(1, 3), devices=(("a:4",),), boundary="broadcast", recompute=True)
    pipeline = Pipeline(micro_batches=1, rows=4, stages=(first, last))
    whole = Pipeline(micro_batches=1, rows=4, stages=(Stage(layers=(0, 3), devices=(("a:5",),)),))
    devices = tuple(f"a:{i}" for i in range(6))
    found = stage_placements(replace(plan(None), devices=devices, pipelines=(pipeline, whole)))
    ends = [(s.number, s.pipeline, s.is_first, s.is_last, s.position) for s in found]
    assert ends == [(0, 0, True, False, 0), (1, 0, False, True, 1), (2, 1, True, True, 0)]
    assert [(s.boundary, s.plan_stage) for s in found[:2]] == [
        ("direct", first),
        ("broadcast", last),
    ]
    placements = [(q.rank, q.coordinates, q.widths, q.rows) for q in found[0].mesh.members]
    assert placements == [
        (2, (0, 0), (2, 2), (0, 3)),
        (0, (0, 1), (2, 2), (0, 3)),
        (1, (1, 0), (2, 2), (3, 4)),
        (3, (1, 1), (2, 2), (3, 4)),
    ]

"""A plan in one line says what tells it from others."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plan.ranks import describe, mesh_text
from meshwright.plan.spec import Job, Pipeline, Plan, Stage, Subject


def plan(rows: tuple[int, ...] | None) -> Plan:
    stage = Stage(layers=(0, 3), devices=(("a:0",), ("a:1",)), rows=rows)
    return Plan(
        name="x",
        model=Subject(name="m", fingerprint=""),
        cluster=Subject(name="c", fingerprint=""),
        job=Job(global_batch=8, sequence=8, precision="fp32"),
        devices=("a:0", "a:1"),
        pipelines=(Pipeline(micro_batches=1, rows=8, stages=(stage,)),),
    )


def test_unlike_tensor_widths_are_told():
    ragged = Stage(layers=(0, 3), devices=(("a:0", "a:1"), ("a:2",)))
    one = plan(None)
    pipelines = (replace(one.pipelines[0], stages=(ragged,)),)
    assert describe(replace(one, pipelines=pipelines)) == "dp2 tp2+1 pp1 [3] 1x8 1f1b"
    assert mesh_text(ragged.devices) == "2 + 1"
    assert mesh_text((("a", "b"),) * 3) == "3 x 2"


def test_unequal_rows_are_told_and_equal_ones_are_not():
    assert describe(plan(None)) == "dp2 tp1 pp1 [3] 1x8 1f1b"
    assert describe(plan((4, 4))) == "dp2 tp1 pp1 [3] 1x8 1f1b"
    assert describe(plan((7, 1))) == "dp2 tp1 pp1 [3] 1x7+1 1f1b"

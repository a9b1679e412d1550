"""Of plans that uncertain predictions do not tell apart, one with few, large pieces of work is
chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.plan.spec import Plan
from meshwright.search.incumbent import Evaluated, chosen, pieces, simplest
from meshwright.search.planner import find_plan
from worlds import DEVICE, cluster, even_model, even_plan, job

MODEL = even_model(8, parameters=10**8)
"""Its gradients take far longer than its work: only a pipeline pays."""
CLUSTER = cluster(("g",), ("g",), network=Link(bandwidth=1e9, latency=0.0), types=(DEVICE,))
JOB = replace(job(64), sequence=1)
BASE = even_plan(even_model(2), CLUSTER)


def seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def test_the_margin_changes_a_plan_to_one_with_larger_micro_batches() -> None:
    fastest = find_plan(MODEL, CLUSTER, JOB)
    sturdy = find_plan(MODEL, CLUSTER, JOB, margin=0.03)
    assert pieces(sturdy.pipelines) <= pieces(fastest.pipelines) / 2
    assert seconds(fastest) < seconds(sturdy) <= 1.03 * seconds(fastest)
    assert sturdy.prediction is not None
    (first, *_) = sturdy.prediction.runners_up
    assert first.step_seconds == pytest.approx(seconds(fastest))
    assert "less than predictions tell apart" in first.reason
    assert find_plan(MODEL, CLUSTER, JOB, margin=0.03) == sturdy


def test_a_narrow_margin_keeps_the_fastest() -> None:
    fastest = find_plan(MODEL, CLUSTER, JOB)
    assert seconds(find_plan(MODEL, CLUSTER, JOB, margin=1e-4)) == seconds(fastest)


def test_a_search_may_leave_coarser_plans_out() -> None:
    without = find_plan(MODEL, CLUSTER, JOB, margin=0.03, forbidden=("coarser-plans",))
    assert without.prediction is not None
    assert not any("coarser-plans" in reason for reason in without.prediction.dropped)


class Field:
    """What `chosen` reads of an incumbent."""

    def __init__(self, others: list[Evaluated], margin: float) -> None:
        self.others, self.margin = others, margin
        self.best = min(others, key=lambda each: each.seconds)


@given(
    st.lists(st.tuples(st.floats(1.0, 1.1), st.integers(1, 6), st.integers(1, 64)), min_size=1),
    st.floats(0.0, 0.1),
)
def test_no_plan_within_the_margin_is_better_in_both(
    field: list[tuple[float, int, int]], margin: float
) -> None:
    (pipeline,), others = BASE.pipelines[:1], []
    for index, (taken, stages, micro_batches) in enumerate(field):
        changed = replace(
            pipeline, stages=pipeline.stages[:1] * stages, micro_batches=micro_batches
        )
        others.append(Evaluated(str(index), replace(BASE, pipelines=(changed,)), taken))
    incumbent = Field(others, margin)
    winner = chosen(incumbent)  # type: ignore[arg-type]
    assert winner.seconds <= incumbent.best.seconds * (1 + max(margin, 1e-9))
    if not margin:
        assert winner is simplest(incumbent)  # type: ignore[arg-type]
        return
    for each in others:
        fewer = pieces(each.plan.pipelines) < pieces(winner.plan.pipelines)
        assert not (fewer and each.seconds < winner.seconds)
        if each.seconds <= incumbent.best.seconds * (1 + margin):
            ratio = pieces(winner.plan.pipelines) / pieces(each.plan.pipelines)
            gain = each.seconds / winner.seconds
            assert gain >= ratio ** math.log2(1 + margin) * (1 - 1e-12)

"""A comparison as it is printed: both plans, what their links carry, and who wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.priced_plan import PricedPlan
from meshwright.plan.spec import Plan
from meshwright.report.comparison import print_comparison
from meshwright.simulate.plan_figures import compare_plans, simulate_figures
from worlds import even_model, even_plan, one_node

MODEL, CLUSTER = even_model(4, cut_bytes=1e6), one_node(2)
ALONE = even_plan(MODEL, CLUSTER, micro_batches=8)
TWO = replace(even_plan(MODEL, CLUSTER, stages=2, micro_batches=8), job=ALONE.job)


def printed(first: Plan, second: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    one, two = (
        simulate_figures(name, PricedPlan(plan, MODEL, CLUSTER))
        for name, plan in (("one.json", first), ("two.json", second))
    )
    print_comparison(one, two, compare_plans(one, two))
    return capsys.readouterr().out


def test_both_plans_their_links_and_the_verdict_are_printed(capsys) -> None:
    """96 ms on one device; on two 48, 6 of bubble, and 8 of transfers, which are as long as every
    link carries the eight megabytes of eight micro-batches."""
    told = " ".join(printed(ALONE, TWO, capsys).split())
    assert "one.json: dp1 tp1 pp1 [4] 8x1 1f1b" in told
    assert "two.json: dp1 tp1 pp2 [2|2] 8x1 1f1b" in told
    assert "n:0 out - 7.629 MiB 13%" in told
    assert "nothing" not in told
    assert "two.json is 1.55 times as fast as one.json" in told


def test_where_no_link_is_used_that_is_said(capsys) -> None:
    told = printed(ALONE, ALONE, capsys)
    assert "nothing" in told
    assert "equally fast" in told

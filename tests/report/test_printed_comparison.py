"""A comparison as it is printed: both plans, what their links carry, and who wins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cost.priced_plan import PricedPlan
from meshwright.plan.spec import Plan
from meshwright.report.comparison import print_comparison, write_comparison
from meshwright.simulate.plan_figures import SimulatedPlan, compare_plans, simulate_figures
from plain_constants import PLAINLY
from worlds import even_model, even_plan, one_node

MODEL, CLUSTER = even_model(4, cut_bytes=1e6), one_node(2)
ALONE = even_plan(MODEL, CLUSTER, micro_batches=8)
TWO = replace(even_plan(MODEL, CLUSTER, stages=2, micro_batches=8), job=ALONE.job)


def simulated(name: str, plan: Plan) -> SimulatedPlan:
    return simulate_figures(name, PricedPlan(plan, MODEL, CLUSTER, PLAINLY))


def printed(first: Plan, second: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    one, two = simulated("one.json", first), simulated("two.json", second)
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


def test_a_bar_shows_the_parts_that_take_time_and_no_others(tmp_path: Path) -> None:
    one, two = simulated("one.json", ALONE), simulated("two.json", TWO)
    write_comparison(tmp_path / "page.html", one, two, compare_plans(one, two))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first, second = page.split('<span class="room">')[1:3]
    pieces = re.compile(r'title="(\w+): ')
    assert pieces.findall(first) == ["compute"]
    assert {*pieces.findall(second)} == {"compute", "bubble", "transfers", "reductions"}

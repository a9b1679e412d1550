"""What plans cost is said in sentences, in a table that fits, and drawn where it lies."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from io import StringIO
from xml.etree import ElementTree

import pytest
import steps_on_paper as paper
from rich.console import Console

from meshwright.cluster.spec import devices_of
from meshwright.money.choose import RentalChoice, RentedPlan
from meshwright.money.files import parse_limit
from meshwright.money.outcomes import ClusterPrices, cluster_prices, front, plan_outcome
from meshwright.money.spec import HourlyPrices, MoneyTerms
from meshwright.report.expenses import (
    choice_sentences,
    expense_sentence,
    front_svg,
    print_choice,
    rented_text,
)

CLUSTER, PLAN = paper.cluster(), paper.plan()
NAMES = [device.name for device in devices_of(CLUSTER)]
PRICES = HourlyPrices(
    currency="USD",
    date="2026-11-28",
    source="our contract",
    file="prices.toml",
    device=dict.fromkeys(CLUSTER.types, 2.0),
    node={},
)


def here(prices: HourlyPrices = PRICES) -> ClusterPrices:
    return cluster_prices(prices, CLUSTER)


def found(number: int, seconds: float) -> RentedPlan:
    plan = replace(PLAN, devices=tuple(NAMES[:number]))
    return RentedPlan(plan=plan, outcome=plan_outcome(here(), plan, seconds))


def choice(*plans: RentedPlan, best: int = 0) -> RentalChoice:
    return RentalChoice(
        best=plans[best],
        found=plans,
        front=front([each.outcome for each in plans]),
        choices=7,
        considered=6,
        searched=len(plans),
        skipped={"the model does not fit": 3},
    )


THREE = choice(found(3, 0.010), found(2, 0.012), found(1, 0.1), best=1)
TERMS = MoneyTerms(prices=PRICES, objective="cost")


def printed(shown: RentalChoice, terms: MoneyTerms = TERMS) -> str:
    out = StringIO()
    print_choice(shown, CLUSTER, terms, Console(file=out, width=80))
    return out.getvalue()


def test_a_plan_says_what_it_costs_by_whose_prices_and_what_is_idle():
    each = found(1, 0.5)
    told = expense_sentence(each.plan, here(), each.outcome)
    assert told.startswith("Its one device costs 2 USD an hour, 0.0002778 USD a step, ")
    assert f"; {len(NAMES) - 1} others are idle: they need not be rented" in told
    assert told.endswith("(hourly prices: our contract, 2026-11-28 (prices.toml)).")
    every = found(len(NAMES), 0.5)
    assert "idle" not in expense_sentence(every.plan, here(), every.outcome)


def test_idle_devices_of_a_node_that_is_paid_whole_are_told():
    node = max(CLUSTER.nodes, key=lambda node: len(node.devices))
    whole = here(replace(PRICES, node={node.name: 9.0}))
    each = replace(PLAN, devices=(f"{node.name}:0",))
    told = expense_sentence(each, whole, plan_outcome(whole, each, 1.0))
    assert "costs 9 USD an hour" in told
    assert len(node.devices) > 1
    assert f"({len(node.devices) - 1} idle ones are paid for with their nodes)" in told


def test_the_table_has_the_front_and_marks_the_best():
    text = printed(THREE)
    rows = [line for line in text.splitlines() if " x " in line]
    assert len(rows) == 2, "the third is dearer and slower"
    assert "<- best" in rows[1]
    assert "USD/Mtoken" in text
    assert "our contract, 2026-11-28" in text
    assert "not rented, and cost nothing" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_best_plan_beside_the_front_is_shown_too():
    cheap_hours = replace(TERMS, limits=(parse_limit("2 USD/h", "USD"),))
    shown = choice(found(3, 0.010), found(2, 0.012), found(1, 0.1), best=2)
    rows = [line for line in printed(shown, cheap_hours).splitlines() if " x " in line]
    assert len(rows) == 3
    assert [("misses" in row, "best" in row) for row in rows] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_the_best_is_compared_with_the_fastest_and_what_was_skipped_is_counted():
    first, last = choice_sentences(THREE, TERMS)
    assert "1.2 times as long" in first
    assert "costs 0.8 times as much" in first
    assert "Of 7 ways to choose nodes" in last
    assert "3 not: the model does not fit" in last
    assert len(choice_sentences(choice(found(1, 1.0)), TERMS)) == 1


def test_a_limit_that_the_nearest_plan_misses_is_told():
    terms = replace(TERMS, limits=(parse_limit("1 USD/h", "USD"),))
    told = choice_sentences(choice(found(1, 0.1)), terms)[0]
    assert told == "The best misses the limit of 1 USD/h: 2 USD/h, 100.0% too much."


def _circles(svg: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("circle")]


def test_the_picture_has_every_plan_at_its_place():
    circles = _circles(front_svg(THREE, CLUSTER, TERMS))
    assert [each.get("class") for each in circles] == ["on", "best", "beaten"]
    across = [float(each.get("cx", "")) for each in circles]
    up = [-float(each.get("cy", "")) for each in circles]
    assert across == sorted(across, reverse=True)
    costs = [each.outcome.expense.per_token for each in THREE.found]
    order = sorted(range(3), key=costs.__getitem__)
    assert sorted(range(3), key=up.__getitem__) == order


def test_the_line_of_the_front_turns_at_right_angles():
    points = re.search(r'points="([^"]+)"', front_svg(THREE, CLUSTER, TERMS))
    assert points
    places = [tuple(map(float, each.split(","))) for each in points[1].split()]
    assert len(places) == 3
    for one, other in itertools.pairwise(places):
        assert one[0] == other[0] or one[1] == other[1]


@pytest.mark.parametrize("amount", [0.0, 1e-9, 1e9])
def test_all_amounts_can_be_drawn(amount):
    prices = replace(PRICES, device=dict.fromkeys(CLUSTER.types, amount))
    outcome = plan_outcome(here(prices), PLAN, 1.0)
    shown = choice(RentedPlan(plan=PLAN, outcome=outcome))
    terms = replace(TERMS, prices=prices)
    assert len(_circles(front_svg(shown, CLUSTER, terms))) == 1
    printed(shown, terms)


def test_texts_of_the_front_do_not_overlap():
    plans = [found(3, 1e-3 * (1 + 1e-4 * n)) for n in range(12)]
    steps = [
        replace(
            each,
            outcome=replace(
                each.outcome,
                expense=replace(each.outcome.expense, per_token=1e-6 * (1 - 1e-4 * n)),
            ),
        )
        for n, each in enumerate(plans)
    ]
    svg = front_svg(choice(*steps), CLUSTER, TERMS)
    heights = [
        float(each.get("y", "")) for each in ElementTree.fromstring(svg).iter()
        if each.get("class") == "name"
    ]  # fmt: skip
    assert len(heights) == 12
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))


def test_names_from_files_stay_names_in_the_picture():
    bad = '</svg><script>alert("1")</script>\u202e'
    prices = replace(PRICES, source=bad)
    svg = front_svg(THREE, CLUSTER, replace(TERMS, prices=prices))
    assert "<script" not in svg
    assert "\u202e" not in svg
    ElementTree.fromstring(svg)


def test_devices_are_counted_by_type():
    kinds = [device.type for device in devices_of(CLUSTER)]
    told = rented_text(replace(PLAN, devices=tuple(NAMES)), CLUSTER)
    assert sum(int(each.split(" x ")[0]) for each in told.split(", ")) == len(kinds)

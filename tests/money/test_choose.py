"""Of all sets of nodes the one that serves best is found, and nothing on the front is missed."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prices import priced, scaled

from meshwright.cluster.spec import Link, cluster_fingerprint, devices_of
from meshwright.cost.memory import usable_bytes
from meshwright.errors import ClusterError, FitError, PlanError, Problem
from meshwright.money import choose
from meshwright.money.choose import choose_rental
from meshwright.money.files import parse_limit
from meshwright.money.outcomes import cluster_prices, dominates, hourly_price, merit, plan_outcome
from meshwright.money.spec import MoneyTerms
from meshwright.plan.validate import validate_plan
from meshwright.records import dumps
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from soaks import portion, tenth
from worlds import FAST, cluster, device, job, model

pytestmark = pytest.mark.heavy
NEAR = 1e-9


def terms_of(prices, objective="time", *limits: str) -> MoneyTerms:
    wanted = tuple(parse_limit(text, "USD") for text in limits)
    return MoneyTerms(prices=prices, objective=objective, limits=wanted)


def chosen(world, terms, **options):
    graph, where, todo = world
    return choose_rental(
        graph, where, todo, None, cluster_prices(terms.prices, where), terms, **options
    )


@st.composite
def worlds(draw):
    """Up to three nodes of up to two devices, priced one by one or as a whole: few enough that a
    search misses nothing, so that more devices never make a plan slower."""
    kinds = st.lists(st.sampled_from(["fast", "slow"]), min_size=1, max_size=2)
    nodes = draw(st.lists(kinds.map(tuple), min_size=1, max_size=3))
    network = Link(
        bandwidth=draw(st.sampled_from([1e7, 1e9, 1e11])),
        latency=draw(st.sampled_from([0.0, 1e-3])),
    )
    where = cluster(*nodes, network=network)
    layers = draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=1, max_size=3))
    amount = st.sampled_from([0.0, 0.5, 1.0, 1.9, 4.0])
    whole = {node.name: draw(amount) for node in where.nodes if draw(st.booleans())}
    prices = priced(whole, fast=draw(amount), slow=draw(amount))
    return (model(layers), where, job(draw(st.sampled_from([1, 2, 4])))), prices


def every_outcome(world, prices):
    """The outcome of the fastest plan of every set of nodes."""
    graph, where, todo = world
    here = cluster_prices(prices, where)
    for number in range(1, len(where.nodes) + 1):
        for nodes in combinations(where.nodes, number):
            plan = find_plan(graph, replace(where, nodes=nodes), todo)
            yield plan_outcome(here, plan, plan.prediction.step_seconds)


def as_good(one, other) -> bool:
    """Whether one is as fast and as cheap as another, up to rounding."""
    cheap = one.expense.per_token <= other.expense.per_token * (1 + NEAR)
    return cheap and one.step_seconds <= other.step_seconds * (1 + NEAR)


@settings(max_examples=portion(8))
@given(worlds(), st.sampled_from(["time", "cost"]))
def test_no_set_of_nodes_is_better_than_the_front(drawn, objective):
    check_front(drawn, objective)


@pytest.mark.slow
@settings(max_examples=tenth(300))
@given(worlds(), st.sampled_from(["time", "cost"]))
def test_no_set_of_nodes_is_better_in_many_more_worlds(drawn, objective):
    check_front(drawn, objective)


def check_front(drawn, objective):
    world, prices = drawn
    terms = terms_of(prices, objective)
    found = chosen(world, terms, whole_front=True)
    kept = [found.found[index].outcome for index in found.front]
    for other in every_outcome(world, prices):
        assert any(as_good(one, other) for one in kept)
        assert merit(found.best.outcome, terms) <= tuple(
            x * (1 + NEAR) for x in merit(other, terms)
        )
    for one in kept:
        assert not any(dominates(other, one) and other != one for other in kept)
    rates = [each.tokens_per_second for each in kept]
    assert rates == sorted(rates, reverse=True)


limits = st.lists(
    st.sampled_from(["1.5 USD/h", "4 USD/h", "0.00003 USD/step", "30 ms", "90 ms", "900 tokens/s"]),
    max_size=2,
)


@settings(max_examples=portion(8))
@given(worlds(), st.sampled_from(["time", "cost"]), limits)
def test_no_set_of_nodes_serves_limits_better(drawn, objective, texts):
    world, prices = drawn
    terms = terms_of(prices, objective, *texts)
    found = chosen(world, terms)
    least = min(merit(each, terms) for each in every_outcome(world, prices))
    assert merit(found.best.outcome, terms) <= tuple(x * (1 + NEAR) + 1e-15 for x in least)


@settings(max_examples=portion(6))
@given(worlds(), st.sampled_from([0.5, 2.0, 64.0]), st.booleans())
def test_other_money_of_the_same_worth_changes_no_choice(drawn, factor, whole_front):
    world, prices = drawn
    one = chosen(world, terms_of(prices, "cost"), whole_front=whole_front)
    other = chosen(world, terms_of(scaled(prices, factor), "cost"), whole_front=whole_front)
    assert one.best.plan == other.best.plan
    assert [each.plan for each in one.found] == [each.plan for each in other.found]
    assert one.front == other.front
    for before, after in zip(one.found, other.found, strict=True):
        assert after.outcome.expense.per_hour == factor * before.outcome.expense.per_hour


FAST_SLOW = model([10.0] * 6), cluster(("fast",) * 2, ("slow",) * 2, ("slow",) * 2), job(16)
SMALL = model([10.0] * 4), cluster(("fast",), ("slow",), ("slow",)), job(4)
DEAR = priced(fast=10.0, slow=1.0)


def test_the_cheapest_plan_is_not_the_fastest_where_speed_is_dear():
    fastest = chosen(SMALL, terms_of(DEAR))
    cheapest = chosen(SMALL, terms_of(DEAR, "cost"))
    assert "a:0" in fastest.best.plan.devices
    assert {device[0] for device in cheapest.best.plan.devices} <= {"b", "c"}
    assert cheapest.best.outcome.step_seconds > fastest.best.outcome.step_seconds
    one, other = (each.best.outcome.expense.per_token for each in (cheapest, fastest))
    assert one < other / 2


def test_limits_lie_between_the_two():
    free, bound = terms_of(DEAR), terms_of(DEAR, "time", "2 USD/h")
    found = chosen(SMALL, bound)
    assert found.best.outcome.expense.per_hour <= 2.0
    assert found.best.outcome.step_seconds > chosen(SMALL, free).best.outcome.step_seconds
    slowest = chosen(SMALL, terms_of(DEAR, "cost"))
    seconds = slowest.best.outcome.step_seconds
    quicker = chosen(SMALL, terms_of(DEAR, "cost", f"{0.9 * seconds} s"))
    assert quicker.best.outcome.step_seconds <= 0.9 * seconds
    assert quicker.best.outcome.expense.per_token >= slowest.best.outcome.expense.per_token


def test_the_nearest_is_found_where_no_plan_keeps_a_limit():
    found = chosen(SMALL, terms_of(DEAR, "time", "0.5 USD/h"))
    assert len(found.best.plan.devices) == 1
    assert found.best.outcome.expense.per_hour == 1.0


def test_a_plan_for_some_devices_is_one_for_the_whole_cluster():
    graph, where, _ = SMALL
    for each in chosen(SMALL, terms_of(DEAR, "cost"), whole_front=True).found:
        plan = each.plan
        validate_plan(plan, graph, where)
        assert plan.cluster.fingerprint == cluster_fingerprint(where)
        seconds = simulate_plan(plan, graph, where).step_seconds
        assert seconds == pytest.approx(plan.prediction.step_seconds, rel=1e-12)
        assert each.outcome.step_seconds == plan.prediction.step_seconds
        paid = hourly_price(cluster_prices(DEAR, where), plan.devices)
        assert (
            each.outcome.expense.per_hour
            == paid
            == sum(10.0 if name.startswith("a") else 1.0 for name in plan.devices)
        )


def test_the_same_input_gives_the_same_bytes():
    one, other = (chosen(SMALL, terms_of(DEAR, "cost"), whole_front=True) for _ in range(2))
    assert dumps(one) == dumps(other)


def test_the_whole_cluster_gets_the_plan_of_an_ordinary_search():
    """Where no other devices are worth a search, for the others cost more and give less."""
    graph, where, todo = model([10.0] * 6), cluster(("fast",) * 2), job(16)
    found = chosen((graph, where, todo), terms_of(priced(fast=1.0)))
    assert found.best.plan == find_plan(graph, where, todo)


def test_what_is_considered_is_searched_or_skipped_for_a_reason():
    found = chosen(SMALL, terms_of(DEAR, "cost"))
    assert found.choices == 5
    assert found.searched + sum(found.skipped.values()) == found.considered
    assert found.searched < found.considered


def test_what_cannot_hold_the_model_is_skipped_and_nothing_at_all_is_an_error():
    small = device("slow", 10.0, 1.2)
    where = cluster(("fast",), ("slow",), types=(device("fast", 20.0, 16.0), small))
    graph = model([10.0] * 2, parameters=20_000_000)
    found = chosen((graph, where, job(4)), terms_of(DEAR, "cost"))
    assert found.skipped[choose.NO_ROOM] >= 1
    assert found.best.plan.devices == ("a:0",)
    alone = replace(where, nodes=where.nodes[1:])
    with pytest.raises(FitError, match="What would help"):
        chosen((graph, alone, job(4)), terms_of(DEAR, "cost"))


def test_mistakes_are_told_as_by_an_ordinary_search():
    graph, where, todo = FAST_SLOW
    with pytest.raises(PlanError, match="describe the model again"):
        chosen((graph, where, replace(todo, sequence=8)), terms_of(DEAR, "cost"))
    half = replace(
        where, types={k: replace(t, peak={"fp64": 1e12}) for k, t in where.types.items()}
    )
    with pytest.raises(ClusterError):
        chosen((graph, half, todo), terms_of(DEAR, "cost"))


def test_a_budget_and_an_interruption_end_it_with_the_best_plan_so_far():
    for whole_front in (False, True):
        found = chosen(
            FAST_SLOW, terms_of(DEAR, "cost"), budget_seconds=1e-3, whole_front=whole_front
        )
        assert found.searched >= 1
        assert found.searched + sum(found.skipped.values()) == found.considered
    asked = [0]

    def count(limit: float) -> bool:
        asked[0] += 1
        return asked[0] > limit

    chosen(SMALL, terms_of(DEAR, "cost"), stop=lambda: count(float("inf")))
    every = asked[0]
    for limit in (every - 1, every // 2):
        asked[0] = 0
        found = chosen(SMALL, terms_of(DEAR, "cost"), stop=lambda most=limit: count(most))
        assert found.searched + sum(found.skipped.values()) == found.considered
    assert chosen(SMALL, terms_of(DEAR, "cost"), stop=lambda: True).searched == 1


def test_an_interruption_before_the_first_plan_is_told(monkeypatch):
    def nothing_yet(*_, **__):
        raise PlanError(Problem("search", "interrupted", "no plan", "time"))

    monkeypatch.setattr(choose, "find_plan", nothing_yet)
    with pytest.raises(PlanError, match="interrupted"):
        chosen(SMALL, terms_of(DEAR, "cost"), stop=lambda: True)
    with pytest.raises(PlanError, match="interrupted"):
        chosen(SMALL, terms_of(DEAR, "cost"), budget_seconds=1e-9)


def watched(monkeypatch, clock: float | None = None) -> list[tuple[tuple[str, ...], float | None]]:
    """What is searched: the devices of each cluster, and its share of the budget, of which no
    search makes any use. The clock, if one is given, stands still."""
    asked = []

    def search(graph, where, todo, profile, *, budget_seconds, **_):
        asked.append((tuple(each.name for each in devices_of(where)), budget_seconds))
        return find_plan(graph, where, todo, profile)

    monkeypatch.setattr(choose, "find_plan", search)
    if clock is not None:
        monkeypatch.setattr(choose.time, "monotonic", lambda: clock)
    return asked


def test_the_budget_is_shared_out_among_those_still_to_come(monkeypatch):
    asked = watched(monkeypatch, clock=100.0)
    found = chosen(SMALL, terms_of(DEAR, "cost"), budget_seconds=12.0, whole_front=True)
    shares = [share for _, share in asked]
    assert len(shares) == found.searched > 1
    assert shares[0] == 12.0 / found.considered
    assert shares == sorted(shares)
    assert shares[-1] <= 12.0
    monkeypatch.undo()
    free = watched(monkeypatch)
    chosen(SMALL, terms_of(DEAR, "cost"))
    assert {share for _, share in free} == {None}


def test_what_a_plan_for_more_devices_leaves_idle_answers_for_those_between(monkeypatch):
    """A network that carries next to nothing: the fast node works alone, whatever stands beside."""
    lonely = Link(bandwidth=1e3, latency=1.0)
    where = cluster(("fast", "fast"), ("slow",), ("slow",), network=lonely)
    asked = watched(monkeypatch)
    even = priced({"a": 1.0}, slow=1.0)
    found = chosen((model([10.0] * 4), where, job(4)), terms_of(even), whole_front=True)
    assert found.best.plan.devices == ("a:0", "a:1")
    searched = [devices for devices, _ in asked]
    assert ("a:0", "a:1", "b:0", "c:0") in searched
    assert ("a:0", "a:1") in searched
    assert ("a:0", "a:1", "b:0") not in searched
    assert found.skipped[choose.ANSWERED] == 1


def test_what_cannot_serve_better_is_not_searched(monkeypatch):
    """One fast device costs least, and was searched before what has a dearer bound."""
    cheap = priced(fast=1.0, slow=100.0)
    asked = watched(monkeypatch)
    found = chosen(SMALL, terms_of(cheap, "cost"))
    assert found.best.plan.devices == ("a:0",)
    assert [devices for devices, _ in asked] == [("a:0",)]
    assert found.skipped == {choose.WORSE: found.considered - 1}


def test_the_front_leaves_out_what_is_beaten_in_both(monkeypatch):
    """One or two slow devices are slower than the fast one, and for a step dearer."""
    asked = watched(monkeypatch)
    graph, _, todo = SMALL
    slower = cluster(("fast",), ("slow",), ("slow",), types=(FAST, device("slow", 9.0)))
    terms = terms_of(priced(fast=2.0, slow=1.0), "cost")
    found = chosen((graph, slower, todo), terms, whole_front=True)
    searched = [devices for devices, _ in asked]
    assert searched == [("a:0", "b:0", "c:0"), ("a:0", "b:0"), ("a:0",)]
    assert found.skipped == {choose.DOMINATED: 2}


@pytest.mark.parametrize(("bytes_each", "skipped"), [(15.9, True), (24.0, False)])
def test_weights_gradients_and_states_must_have_room(monkeypatch, bytes_each, skipped):
    """AdamW in fp32: 4 bytes of each, and 8 of states."""
    parameters = 50_000_000
    graph = model([10.0] * 2, parameters=parameters // 2, saved=1.0)
    one, two = device("slow", 10.0, 8.0), device("slow", 10.0, 16.0)
    slope = (usable_bytes(two) - usable_bytes(one)) / (two.memory - one.memory)
    memory = one.memory + (bytes_each * parameters - usable_bytes(one)) / slope
    types = (device("fast", 20.0, 16.0), replace(one, memory=round(memory)))
    where = cluster(("fast",), ("slow",), types=types)
    asked = watched(monkeypatch)
    found = chosen((graph, where, job(4)), terms_of(priced(fast=9.0, slow=0.1)), whole_front=True)
    assert (("b:0",) in [devices for devices, _ in asked]) is not skipped
    assert found.searched + sum(found.skipped.values()) == found.considered


def test_progress_counts_up_to_the_number_of_choices():
    told = []
    found = chosen(SMALL, terms_of(DEAR, "cost"), progress=lambda what, *_: told.append(what))
    assert told[0] == "bounding"
    numbers = [re.match(r"choice (\d+) of (\d+): ", text) for text in told if "choice" in text]
    assert numbers[0][1] == "1"
    assert {each[2] for each in numbers} == {str(found.considered)}
    order = [int(each[1]) for each in numbers]
    assert order == sorted(order)
    assert order[-1] <= found.considered


def test_an_interruption_ends_it_where_nothing_has_fitted_yet(monkeypatch):
    """Nothing more is searched but the whole cluster, which says why nothing fits."""
    asked = []

    def misfit(*_, **__):
        asked.append(1)
        raise FitError(Problem("model", "memory", "too much", "less"))

    monkeypatch.setattr(choose, "find_plan", misfit)
    with pytest.raises(FitError):
        chosen(SMALL, terms_of(DEAR, "cost"), stop=lambda: bool(asked))
    assert len(asked) == 2

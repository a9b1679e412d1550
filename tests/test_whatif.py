"""What edits of a cluster buy, with and without measured times; and the nearest regular plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, Link
from meshwright.cost.profile import LayerTime, LinkTimes, Profile
from meshwright.errors import ClusterError, MoneyError, PlanError
from meshwright.money.files import parse_limit
from meshwright.money.spec import HourlyPrices, MoneyTerms
from meshwright.plan.spec import Job
from meshwright.records import dumps
from meshwright.report.whatif import cost_sentence, print_whatif
from meshwright.workflows.export_plan import even_stage_cuts
from meshwright.workflows.session import SearchLimits, Session, search_plan
from meshwright.workflows.what_if import ClusterEdits, what_if
from worlds import DEVICE, cluster, even_model, one_node

pytestmark = pytest.mark.heavy


def two_nodes() -> Cluster:
    """Two nodes with a device each, and a network that is slow enough to matter."""
    network = Link(bandwidth=1e7)
    return cluster(("g",), ("g",), inside=network, network=network, types=(DEVICE,))


def session(cluster: Cluster, profile: Profile | None = None) -> Session:
    model = even_model(8, cut_bytes=1e4, parameters=1000)
    return Session(
        model=model,
        cluster=cluster,
        job=Job(global_batch=8, sequence=1, precision="fp32", optimizer="sgd"),
        profile=profile,
        model_source="",
        cluster_source="",
        profile_source="profile.json",
        warnings=(),
    )


def asked(here: Session, **edits: tuple[str, ...]):
    return what_if(here, search_plan(here), ClusterEdits(**edits))[0]


def test_a_second_node_buys_a_shorter_step_and_its_loss_a_longer_one():
    more = asked(session(one_node(1)), added=("1 x n",))
    assert 1.5 < more.speed_up < 2
    assert [each.step_seconds is not None for each in more.options] == [True] * 4
    less = asked(session(two_nodes()), without=("b",))
    assert less.speed_up < 1
    assert less.options[2].reason.startswith("cannot: devices")
    assert less.best.devices == ("a:0",)


def test_an_edit_that_changes_nothing_buys_nothing():
    assert asked(session(two_nodes()), settings=("link.network=80 Mbit/s",)).speed_up == 1


def test_a_plan_that_was_not_the_best_is_no_merit_of_the_edit():
    here = session(two_nodes())
    alone = search_plan(replace(here, cluster=replace(here.cluster, nodes=here.cluster.nodes[:1])))
    alone = replace(alone, cluster=replace(alone.cluster, fingerprint=""))
    found, _ = what_if(here, alone, ClusterEdits(settings=("link.network=80 Mbit/s",)))
    now, best, kept, after = (each.step_seconds for each in found.options)
    assert now == kept
    assert best == after
    assert best < now
    assert found.speed_up == 1


def profile(links: LinkTimes | None = None) -> Profile:
    signature = even_model(1).layers[0].signature
    layer = LayerTime(
        device="g",
        signature=signature,
        precision="fp32",
        tensor=1,
        rows=1,
        forward_seconds=1e-3,
        backward_seconds=2e-3,
    )
    return Profile(model="even", sequence=1, layers=(layer,), links=links)


def test_a_measured_link_can_be_set():
    slow = profile(LinkTimes(network=Link(bandwidth=1e6), all_reduce_latency=1e-5))
    found = asked(session(two_nodes(), slow), settings=("link.network=1 Gbit/s",))
    assert found.speed_up > 1.01


def test_a_speed_that_was_measured_cannot():
    here = session(two_nodes(), profile())
    for figure in ("peak.fp32=1 PFLOP/s", "matmul_efficiency=0.9", "memory_bandwidth=1 TB/s"):
        with pytest.raises(PlanError, match=r"measured times replace \(profile\.json\)"):
            asked(here, settings=(f"device.g.{figure}",))
    assert asked(here, settings=("device.g.memory=32 GiB",)).speed_up == 1


def test_nothing_to_change_and_nothing_left_are_refused():
    here = session(two_nodes())
    with pytest.raises(PlanError, match="nothing to change"):
        asked(here)
    with pytest.raises(ClusterError, match="at least one device"):
        asked(here, without=("a", "b"))


def test_both_searches_leave_out_what_the_plan_left_out():
    slow_updates = replace(DEVICE, memory_bandwidth=1e8)
    nodes = (("g", "g"), ("g", "g"))
    here = session(cluster(*nodes, network=Link(bandwidth=1e9), types=(slow_updates,)))
    without = SearchLimits(forbidden=("divided-states",))
    plan = search_plan(here, without)
    for limits, divided in ((without, False), (SearchLimits(), True)):
        edits = ClusterEdits(settings=("link.network=9 Gbit/s",))
        found = what_if(here, plan, edits, limits)[0]
        assert ("zero1" in found.best.name) == divided
        steps = [each.step_seconds for each in found.options]
        assert (steps[1] < steps[0]) == divided


@given(st.integers(3, 120), st.integers(1, 40))
def test_even_cuts_hold_every_layer_on_no_empty_stage(layers, stages):
    for cuts in even_stage_cuts(layers, stages):
        assert len(cuts) == stages
        assert cuts[0][0] == 0
        assert cuts[-1][1] == layers
        assert all(before[1] == after[0] for before, after in itertools.pairwise(cuts))
        assert all(first < end for first, end in cuts)


def test_both_searches_end_when_somebody_wants_it():
    here = session(two_nodes())
    plan = search_plan(here)
    looks = [0]

    def count(limit: float) -> bool:
        looks[0] += 1
        return looks[0] > limit

    what_if(here, plan, ClusterEdits(added=("1 x a",)), stop=lambda: count(float("inf")))
    every = looks[0]
    for limit in (every - 1, every // 2):
        looks[0] = 0
        found, _ = what_if(
            here, plan, ClusterEdits(added=("1 x a",)), stop=lambda n=limit: count(n)
        )
        assert found.best.prediction is not None
        assert found.seconds_after <= min(
            each.step_seconds for each in found.options[2:] if each.step_seconds
        )


def terms_of(objective="time", *limits: str, **node: float) -> MoneyTerms:
    """A price of 3 USD an hour for each device, and one for whole nodes."""
    prices = HourlyPrices(
        currency="USD",
        date="2026-11-28",
        source="a test",
        file="prices.toml",
        device={"g": 3.0},
        node=node,
    )
    wanted = tuple(parse_limit(text, "USD") for text in limits)
    return MoneyTerms(prices=prices, objective=objective, limits=wanted)


def test_prices_add_what_each_plan_costs_and_change_no_answer():
    here = session(two_nodes())
    plan, edits = search_plan(here), ClusterEdits(added=("1 x a",))
    plain = what_if(here, plan, edits)[0]
    told = what_if(here, plan, edits, terms=terms_of())[0]
    bare = tuple(replace(each, expense=None, misses=None) for each in told.options)
    assert bare == plain.options
    assert told.best == plain.best
    assert "expense" not in dumps(plain)
    for each in told.options:
        devices = round(each.expense.per_hour / 3.0)
        assert each.expense.per_hour == 3.0 * devices
        assert each.expense.per_step == pytest.approx(3.0 * devices * each.step_seconds / 3600)
    assert cost_sentence(plain) == ""
    assert "per million tokens before" in cost_sentence(told)


def test_the_least_cost_is_kept_where_it_is_the_objective():
    """Two devices are less than twice as fast as one: whoever pays for tokens takes one."""
    here = session(two_nodes())
    edits = ClusterEdits(added=("1 x a",))
    cheap = what_if(here, search_plan(here), edits, terms=terms_of("cost"))[0]
    assert [each.expense.per_hour for each in cheap.options] == [6.0, 3.0, 6.0, 3.0]
    assert len(cheap.best.devices) == 1
    assert cheap.expense_after == cheap.options[3].expense
    assert cheap.seconds_before == cheap.options[1].step_seconds
    assert "the same" in cost_sentence(cheap)


def test_a_limit_that_no_plan_keeps_yet_is_what_the_edit_is_asked_for():
    here = session(two_nodes())
    plan = search_plan(here)
    wanted = f"{0.75 * plan.prediction.step_seconds} s"
    edits = ClusterEdits(added=("2 x a",))
    found = what_if(here, plan, edits, terms=terms_of("cost", wanted))[0]
    assert [bool(each.misses) for each in found.options] == [True, True, True, False]
    assert "too much" in found.options[0].misses[0]


def test_added_nodes_and_removed_ones_may_have_prices(capsys):
    here = session(two_nodes())
    plan = search_plan(here)
    terms = terms_of("time", a=1.0, **{"new-0": 2.0})
    found = what_if(here, plan, ClusterEdits(added=("1 x a",), without=("b",)), terms=terms)[0]
    assert found.options[0].expense.per_hour == 4.0
    assert found.options[3].expense.per_hour == 3.0
    print_whatif(found)
    printed = capsys.readouterr().out
    assert "USD/Mtoken" in printed
    assert "a test, 2026-11-28" in printed


def test_a_price_that_only_the_edited_cluster_needs_is_missed_before_any_search():
    here = session(two_nodes())
    plan = search_plan(here)
    with pytest.raises(MoneyError, match=r"prices\.toml: device\.T4: found no price"):
        what_if(here, plan, ClusterEdits(added=("4 x T4",)), terms=terms_of())

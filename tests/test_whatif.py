"""What edits of a cluster buy, with and without measured times; and the nearest regular plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, Link
from meshwright.cost.profile import LayerTime, LinkTimes, Profile
from meshwright.errors import ClusterError, PlanError
from meshwright.plan.spec import Job
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

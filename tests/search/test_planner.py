"""The plan that is found: legal, fitting, never beaten by hand, the same every time."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.cost.memory import total_bytes
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.errors import ClusterError, FitError, PlanError
from meshwright.model.spec import structure_fingerprint
from meshwright.plan.validate import validate_plan
from meshwright.records import dumps, fingerprint
from meshwright.search.planner import baseline_plan, find_plan
from meshwright.simulate.simulator import simulate_plan
from soaks import portion
from worlds import FAST, GIB, SLOW, cluster, device, job, model


@st.composite
def worlds(draw):
    per_node = draw(st.sampled_from([1, 2, 4]))
    kinds = [
        (draw(st.sampled_from(["fast", "slow"])),) * per_node
        for _ in range(draw(st.integers(1, 3)))
    ]
    network = Link(bandwidth=draw(st.sampled_from([1e7, 1e9, 1e11])), latency=1e-5)
    layers = draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=1, max_size=6))
    graph = model(
        layers, parameters=draw(st.sampled_from([1000, 5_000_000])), tied=draw(st.booleans())
    )
    return graph, cluster(*kinds, network=network), job(draw(st.sampled_from([1, 3, 8])))


@pytest.mark.heavy
@settings(max_examples=portion(15))
@given(worlds())
def test_every_plan_is_legal_fits_and_is_not_beaten_by_its_runners_up(world):
    graph, where, todo = world
    plan = find_plan(graph, where, todo)
    validate_plan(plan, graph, where)
    found = plan.prediction
    assert all(total_bytes(m) <= m.capacity for m in found.memory)
    simulated = simulate_plan(plan, graph, where).step_seconds
    assert found.step_seconds == pytest.approx(simulated, rel=1e-9)
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    for other in found.runners_up:
        assert other.reason
        assert other.step_seconds is None or other.step_seconds >= found.step_seconds * (1 - 1e-8)


@pytest.mark.heavy
def test_the_same_input_gives_the_same_bytes():
    world = model([10.0] * 6, tied=True), cluster(("fast",) * 2, ("slow",) * 2), job(16)
    assert dumps(find_plan(*world)) == dumps(find_plan(*world))


def test_a_plan_says_what_it_is_for():
    graph, where, todo = model([10.0] * 4), cluster(("fast",) * 2), job(4)
    plan = find_plan(graph, where, todo)
    assert plan.model.fingerprint == structure_fingerprint(graph)
    assert plan.cluster.fingerprint == fingerprint(where)
    assert plan.job == todo
    assert plan.devices == ("a:0", "a:1")
    found = plan.prediction
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)


def test_at_most_six_runners_up_are_told_beside_those_made_by_hand():
    plan = find_plan(model([10.0] * 6), cluster(("fast",), ("slow",)), job(8))
    names = [other.name.partition(":")[0] for other in plan.prediction.runners_up]
    assert len(names) == len(set(names))
    assert {*names} >= {"ddp", "even", "amp"}
    assert len(names) == 6 + 3


def test_a_mixed_cluster_is_used_better_than_by_hand():
    """Two fast and two slow devices, a model too large for one: the fast ones take two thirds."""
    types = tuple(replace(kind, memory=int(1.6 * GIB)) for kind in (FAST, SLOW))
    where = cluster(("fast", "fast"), ("slow", "slow"), types=types)
    graph, todo = model([200.0] * 12, parameters=5_000_000), job(32)
    found = find_plan(graph, where, todo)
    by_hand = baseline_plan("even", graph, where, todo)
    assert found.prediction.step_seconds < 0.9 * by_hand.prediction.step_seconds
    layers = Counter()
    for stage in found.pipelines[0].stages:
        for replica in stage.devices:
            layers[replica[0][0]] += stage.layers[1] - stage.layers[0]
    assert layers["a"] == 2 * layers["b"]


def test_devices_that_only_slow_the_others_down_are_left_out():
    """The slow node is at the far end of a modem."""
    where = cluster(("fast",) * 2, ("slow",) * 2, network=Link(bandwidth=1e4, latency=0.1))
    plan = find_plan(model([10.0] * 4), where, job(8))
    assert {name[0] for name in plan.devices} == {"a"}


def test_a_job_too_small_for_all_devices_gets_fewer():
    plan = find_plan(model([10.0], units=1), cluster(("fast",) * 4), job(3))
    assert len(plan.devices) == 3


def test_measured_links_replace_stated_ones():
    where = cluster(("fast",), ("fast",), network=Link(bandwidth=1e4, latency=0.1))
    graph, todo = model([100.0] * 4), job(8)
    assert len(find_plan(graph, where, todo).devices) == 1
    measured = LinkTimes(network=Link(bandwidth=1e11, latency=1e-6))
    profile = Profile(model=graph.name, sequence=16, links=measured)
    assert len(find_plan(graph, where, todo, profile).devices) == 2


def test_nothing_fits_says_how_much_is_missing_and_that_much_is_enough():
    where = cluster(("fast",), ("fast",), types=(device("fast", memory_gib=1.1),))
    graph, todo = model([10.0] * 2, parameters=20_000_000), job(2)
    with pytest.raises(FitError) as failure:
        find_plan(graph, where, todo)
    problem = failure.value.problems[0]
    assert "too much" in problem.found
    assert " on a:0" in problem.found or " on b:0" in problem.found
    assert "sgd" in problem.mend
    needed = float(problem.mend.split("devices with ")[1].split(" GiB")[0])
    enough = cluster(("fast",), ("fast",), types=(device("fast", memory_gib=needed * 1.001),))
    assert find_plan(graph, enough, todo).prediction.memory


@pytest.mark.parametrize(
    ("parameters", "saved", "shorter"), [(1_000_000, 2e8, True), (100_000_000, 1e6, False)]
)
def test_a_shorter_sequence_is_advised_where_it_is_what_takes_the_memory(
    parameters, saved, shorter
):
    where = cluster(("fast",), types=(device("fast", memory_gib=1.1),))
    with pytest.raises(FitError) as failure:
        find_plan(model([10.0] * 2, parameters=parameters, saved=saved), where, job(1))
    assert ("a shorter sequence" in failure.value.problems[0].mend) == shorter


def test_what_would_be_faster_but_does_not_fit_is_among_the_runners_up():
    where = cluster(("fast",) * 2, types=(device("fast", memory_gib=1.5),))
    plan = find_plan(model([10.0] * 4, parameters=10_000_000, units=1), where, job(8))
    reasons = [r.reason for r in plan.prediction.runners_up if r.step_seconds is None]
    assert any(reason.startswith("does not fit: a:") for reason in reasons)
    assert plan.prediction.dropped["does not fit in memory"] > 0


def test_progress_is_told_to_the_end():
    calls = []
    find_plan(
        model([10.0] * 2), cluster(("fast",) * 2), job(4), progress=lambda *call: calls.append(call)
    )
    last = {what: (done, total) for what, done, total in calls}
    assert set(last) >= {"searching", "simulating"}
    assert all(done == total for done, total in last.values())


@pytest.mark.parametrize(
    ("field", "value"), [("global_batch", 0), ("sequence", 17), ("precision", "bf16")]
)
def test_a_job_that_contradicts_the_model_is_refused(field, value):
    with pytest.raises(PlanError) as failure:
        find_plan(model([1.0]), cluster(("fast",)), replace(job(), **{field: value}))
    assert [problem.field for problem in failure.value.problems] == [field]


def test_a_precision_that_no_device_offers_is_refused():
    graph = replace(model([1.0]), precision="bf16")
    with pytest.raises(ClusterError) as failure:
        find_plan(graph, cluster(("fast",)), replace(job(), precision="bf16"))
    assert "fp32" in str(failure.value)


def test_devices_that_do_not_offer_the_precision_are_counted():
    half = replace(FAST, name="half", peak={"fp32": 2e13, "bf16": 4e13})
    where = cluster(("half", "half"), ("slow",), types=(half, SLOW))
    graph = replace(model([10.0] * 4), precision="bf16")
    plan = find_plan(graph, where, replace(job(), precision="bf16"))
    assert set(plan.devices) <= {"a:0", "a:1"}
    assert plan.prediction.dropped["devices that do not offer bf16"] == 1


@pytest.mark.parametrize("name", ["ddp", "even", "amp"])
def test_hand_made_plans_are_legal_and_no_faster(name):
    graph, where, todo = model([10.0] * 6), cluster(("fast",) * 2, ("slow",) * 2), job(16)
    plan = baseline_plan(name, graph, where, todo)
    validate_plan(plan, graph, where)
    best = find_plan(graph, where, todo).prediction.step_seconds
    assert plan.prediction.step_seconds >= best


def test_unknown_and_impossible_baselines_say_so():
    graph = model([10.0] * 6)
    with pytest.raises(PlanError, match="'ddp' or 'even' or 'amp'"):
        baseline_plan("best", graph, cluster(("fast",)), job())
    with pytest.raises(PlanError, match="3 devices, 8 rows"):
        baseline_plan("ddp", graph, cluster(("fast",) * 3), job(8))
    where = cluster(("fast",), types=(device("fast", memory_gib=1.01),))
    large = model([1.0] * 2, parameters=10**8)
    with pytest.raises(FitError, match="found 1 strategies, none of which fits"):
        baseline_plan("ddp", large, where, job())

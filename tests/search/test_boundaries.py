"""The kind of each boundary is chosen in the simulator."""

from dataclasses import replace

import pytest

from meshwright.cluster.spec import Link
from meshwright.cost.priced_plan import PricedPlan
from meshwright.plan.spec import Pipeline, Plan, Stage
from meshwright.plan.validate import validate_plan
from meshwright.report.resources import resource_name
from meshwright.search.bounds import pipeline_bound
from meshwright.search.candidate import candidate_of, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import costs_of
from meshwright.search.finishing import finish
from meshwright.search.incumbent import Incumbent, simulate_and_record
from meshwright.search.options.boundary_kinds import KINDS, OPTION, wide_cuts, with_boundaries
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from meshwright.simulate.symmetry import find_symmetry, simulate_by_symmetry
from meshwright.simulate.traffic import link_loads
from worlds import NVLINK, cluster, device, job, model, plan_by_hand

SLOW = Link(bandwidth=1e7, latency=1e-5, kind="measured")


def world(*stages: Stage, rows: int = 4):
    """Two nodes of four over a slow network; each row crosses a cut with 100 kB."""
    where = cluster(("fast",) * 4, ("fast",) * 4, network=SLOW)
    graph = model([10.0] * 4)
    pipeline = Pipeline(micro_batches=2, rows=rows, stages=stages)
    plan = plan_by_hand(pipeline, job=job(2 * rows))
    plan = replace(plan, devices=tuple(sorted(plan.devices)))
    return graph, where, plan


def stage(layers: tuple[int, int], *replicas: str) -> Stage:
    """`a0 a1` is one replica of two tensor ranks."""
    named = tuple(tuple(f"{d[0]}:{d[1]}" for d in replica.split()) for replica in replicas)
    return Stage(layers=layers, devices=named)


def contest_of(graph, where, plan) -> Incumbent:
    incumbent = Incumbent(costs_of(graph, where, plan.job, None), "")
    simulate_and_record(incumbent, plan, "by hand")
    return incumbent


def test_replicated_tensors_cross_a_slow_network_once():
    """Direct, four devices of a node each receive the same bytes over one interface."""
    graph, where, plan = world(stage((0, 2), "a0"), stage((2, 4), "b0 b1 b2 b3"))
    incumbent = contest_of(graph, where, plan)
    direct = incumbent.best.seconds
    finish(incumbent, [OPTION], lambda *_: None)
    chosen = incumbent.best.plan.pipelines[0].stages[1].boundary
    assert chosen in KINDS
    assert incumbent.best.seconds < 0.5 * direct
    for kind in KINDS:
        other = with_boundaries(plan, [(0, 1)], kind)
        seconds = simulate_plan(other, graph, where).step_seconds
        assert seconds >= incumbent.best.seconds * (1 - 1e-9)
    again = contest_of(graph, where, plan)
    finish(again, [OPTION], lambda *_: None)
    assert again.best.plan == incumbent.best.plan


def test_without_tensor_ranks_there_is_nothing_to_choose():
    graph, where, plan = world(stage((0, 2), "a0", "a1"), stage((2, 4), "b0", "b1"))
    incumbent = contest_of(graph, where, plan)
    assert not list(wide_cuts(plan))
    finish(incumbent, [OPTION], lambda *_: None)
    assert incumbent.best.plan == plan
    assert len(incumbent.others) == 1


def test_what_is_no_faster_stays_direct():
    """Inside one node every device has a port of its own."""
    where = replace(cluster(("fast",) * 4), nodes=cluster(("fast",) * 4).nodes)
    graph, _, plan = world(stage((0, 2), "a0 a1"), stage((2, 4), "a2 a3"))
    incumbent = contest_of(graph, where, plan)
    finish(incumbent, [OPTION], lambda *_: None)
    assert where.nodes[0].inside == NVLINK
    assert incumbent.best.plan == plan
    assert incumbent.pruned["boundary-kinds: slower in the simulator"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_links_carry_what_crosses_once(kind):
    """Two micro-batches of 400 kB each way; direct, four times that towards four devices."""
    graph, where, plan = world(stage((0, 2), "a0"), stage((2, 4), "b0 b1 b2 b3"))

    def carried(plan: Plan) -> dict[str, float]:
        loads = link_loads(PricedPlan(plan, graph, where))
        return {resource_name(load.resource): load.bytes for load in loads}

    network = "a network out"
    sums = carried(plan)[network] - 4 * 2 * 400_000
    assert carried(with_boundaries(plan, [(0, 1)], kind))[network] == pytest.approx(
        2 * 400_000 + sums
    )


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_whose_copies_meet_are_played_by_one_of_them(kind):
    graph, where, plan = world(stage((0, 2), "a0 a1", "a2 a3"), stage((2, 4), "b0 b1", "b2 b3"))
    changed = with_boundaries(plan, [(0, 1)], kind)
    assert len(find_symmetry(changed, where, graph).ranks) == 4
    assert len(find_symmetry(plan, where, graph).ranks) < 4
    whole = simulate_plan(changed, graph, where).step_seconds
    assert simulate_by_symmetry(changed, graph, where).step_seconds == pytest.approx(whole)


def test_a_plan_found_has_its_boundaries_chosen():
    """Two nodes that must share layers by tensor parallelism to hold them."""
    where = cluster(("fast",) * 4, ("fast",) * 4, network=SLOW, types=(device("fast", 20.0, 2.0),))
    graph = model([10.0] * 2, parameters=240_000_000)
    plan = find_plan(graph, where, job(8))
    validate_plan(plan, graph, where)
    assert list(wide_cuts(plan))
    assert {stage.boundary for stage in plan.pipelines[0].stages} & set(KINDS)
    seconds = simulate_plan(plan, graph, where).step_seconds
    assert plan.prediction.step_seconds == pytest.approx(seconds)
    for cut in wide_cuts(plan):
        other = with_boundaries(plan, [cut], "direct")
        assert simulate_plan(other, graph, where).step_seconds >= seconds * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_take_the_time_of_their_bytes(kind):
    """One micro-batch of 4 rows: 400 kB over 10 MB/s each way instead of four times that."""
    graph, where, plan = world(stage((0, 2), "a0"), stage((2, 4), "b0 b1 b2 b3"))
    one = replace(plan, pipelines=(replace(plan.pipelines[0], micro_batches=1),))

    def sent(plan: Plan) -> float:
        timeline = simulate_plan(plan, graph, where)
        return max(i.end_seconds - i.start_seconds for i in timeline.intervals if i.op == "RECV_F")

    assert sent(one) == pytest.approx(4 * 0.04, rel=0.01)
    assert sent(with_boundaries(one, [(0, 1)], kind)) == pytest.approx(0.04, rel=0.01)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("a0",), ("b0 b1 b2 b3",)),
        (("a0 a1",), ("b0 b1",)),
        (("a0 a1 a2 a3",), ("b0 b1", "b2 b3")),
        (("a0 a1", "a2 a3"), ("b0 b1 b2 b3",)),
    ],
)
def test_the_closed_form_scatters_over_a_slow_network(before, after):
    """Two stages of which each works on one micro-batch: nothing overlaps, so that it is exact."""
    graph, where, plan = world(stage((0, 2), *before), stage((2, 4), *after))
    pipelines = (replace(candidate_of(plan.pipelines[0]), micro_batches=1),)
    seconds, steps = {}, {}
    for scatters in (False, True):
        costs = costs_of(graph, where, job(4), scatters=scatters)
        written = plan_of(costs, pipelines, "1f1b")
        assert written.pipelines[0].stages[1].boundary == ("scatter_gather" if scatters else None)
        seconds[scatters] = candidate_seconds(costs, pipelines, "1f1b")
        steps[scatters] = simulate_plan(written, graph, where).step_seconds
    assert steps[True] < 0.8 * steps[False]
    assert seconds[True] == pytest.approx(steps[True], rel=0.02)
    assert seconds[True] / seconds[False] == pytest.approx(steps[True] / steps[False], rel=0.02)


def test_the_bound_of_scattered_cuts_holds():
    graph, where, plan = world(stage((0, 2), "a0 a1"), stage((2, 4), "b0 b1 b2 b3"))
    costs = costs_of(graph, where, plan.job, scatters=True)
    pipeline = candidate_of(plan.pipelines[0])
    step = simulate_plan(plan_of(costs, (pipeline,), "1f1b"), graph, where).step_seconds
    assert pipeline_bound(costs, pipeline, "1f1b") <= step

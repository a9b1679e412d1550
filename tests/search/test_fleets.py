"""Strategies over whole fleets of nodes: legal, near what the simulator says, better with more."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, islice, pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import FitError, PlanError
from meshwright.plan.validate import validate_plan
from meshwright.program.schedules import in_flight
from meshwright.records import dumps
from meshwright.search import template_builds, template_search
from meshwright.search.balanced_estimate import Builds, balanced, build_prices
from meshwright.search.candidate import plan_of
from meshwright.search.candidate_estimate import candidate_seconds, pipeline_prices
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of, group_capacity, group_prefix, stage_bytes
from meshwright.search.device_classes import (
    PipelineTemplate,
    RatedClass,
    StageRun,
    blocks_for,
    device_classes,
    groupings,
    nodes_for,
    written,
)
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.pipeline_seconds import Order
from meshwright.search.plan_estimate import whole_seconds
from meshwright.search.planner import baseline_plan, find_plan
from meshwright.search.template_estimate import cuts, estimate_template
from meshwright.simulate.symmetry import simulate_by_symmetry
from soaks import portion, tenth
from worlds import NVLINK, device, job, model

FAST, SLOW = device("fast", 30.0), device("slow", 10.0)
NETWORK = Link(bandwidth=1e10, latency=1e-5)


def machines(fast, slow, each=8, *, memory=16.0, apart=False, network=NETWORK):
    """Nodes of either type; `apart`: the slow ones at another site."""
    types = {k.name: replace(k, memory=int(memory * (1 << 30))) for k in (FAST, SLOW)}
    nodes = [
        Node(
            name=f"{kind[0]}{i}",
            site="there" if apart and kind == "slow" else "here",
            devices=(kind,) * each,
            inside=NVLINK,
            network=network,
        )
        for kind, count in (("fast", fast), ("slow", slow))
        for i in range(count)
    ]
    uplink = Link(bandwidth=1e9, latency=1e-3)
    sites = (Site(name="here", uplink=uplink), Site(name="there", uplink=uplink))
    return Cluster(name="fleet", types=types, nodes=tuple(nodes), sites=sites)


def strategies_of(graph, where, todo, most):
    costs = costs_of(graph, where, todo)
    for order in get_args(Order):
        found = template_search.template_strategies(costs, order, Counter(), lambda: False)
        for schedule, lines in islice(found, most):
            yield plan_of(costs, lines, schedule)


@st.composite
def fleet_worlds(draw):
    where = machines(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9])),
        memory=draw(st.sampled_from([1.2, 1.4, 16.0])),
        apart=draw(st.booleans()),
        network=Link(bandwidth=draw(st.sampled_from([1e8, 1e10])), latency=1e-5),
    )
    graph = model(
        draw(st.lists(st.sampled_from([1.0, 10.0, 70.0]), min_size=1, max_size=14)),
        parameters=draw(st.sampled_from([1000, 10_000_000])),
        tied=draw(st.booleans()),
        units=draw(st.sampled_from([0, 1, 2, 4, 6])),
    )
    return graph, where, job(draw(st.integers(1, 96)))


@settings(max_examples=portion(15))
@given(fleet_worlds())
def test_every_strategy_holds_every_layer_once_and_fits(world):
    for plan in strategies_of(*world, most=6):
        validate_plan(plan, world[0], world[1])
        assert not memory_problems(plan, world[0], world[1])


@settings(max_examples=portion(15))
@given(fleet_worlds())
def test_no_strategy_is_faster_than_the_certificate(world):
    bound = certificate(costs_of(*world)).seconds
    for plan in strategies_of(*world, most=3):
        assert bound <= simulate_by_symmetry(plan, *world[:2]).step_seconds * (1 + 1e-9)


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_stage_runs_are_written_on_devices_of_their_own(units, depth, width, tensor):
    for block in blocks_for(units, width):
        assert width % block == 0
        assert units % block <= units / 4
        needed = nodes_for(units, depth, width, block)
        where = machines(needed, 0, units * tensor)
        costs = costs_of(model([1.0]), where, job())
        template = PipelineTemplate((StageRun(0, tensor, depth, width, block),), width)
        stages = written(device_classes(costs), template, {})
        names = [name for stage in stages for unit in stage for name in unit]
        assert len(stages) == depth
        assert all(len(stage) == width for stage in stages)
        assert all(len({name.split(":")[0] for name in u}) == 1 for s in stages for u in s)
        assert len(set(names)) == len(names) == depth * width * tensor
        assert len({name.split(":")[0] for name in names}) <= needed


@given(st.integers(2, 9), st.integers(1, 4), st.sampled_from([1, 2]))
def test_a_class_at_both_ends_of_a_pipeline_takes_no_more_nodes_than_at_one(outer, inner, width):
    runs = StageRun(0, 1, outer, width, width), StageRun(1, 1, inner, width, width)
    costs = costs_of(model([1.0]), machines(5, 2, 4), job())
    every = device_classes(costs)
    found = list(template_search._around(PipelineTemplate(runs, width)))
    assert found
    for template in found:
        taken = {}
        stages = written(every, template, taken)
        names = [name for stage in stages for group in stage for name in group]
        assert len(stages) == template.depth == outer + inner
        assert len(set(names)) == len(names) == (outer + inner) * width
        assert taken == {r.device_class: nodes_for(4, r.depth, width, width) for r in runs}
        kinds = [every[run.device_class].kind for run, _ in template.stages]
        assert [costs.devices[stage[0][0]].type for stage in stages] == kinds


def test_groupings_of_few_fleets_are_the_partitions_of_every_set():
    a, b = RatedClass(0, "here", 2.0), RatedClass(1, "there", 1.0)
    found = list(groupings((a, b)))
    assert sorted(map(str, found)) == sorted(map(str, [((a,),), ((b,),), ((a, b),), ((a,), (b,))]))


def test_groupings_of_many_fleets_have_all_together_and_each_site_apart():
    every = tuple(RatedClass(i, "here" if i < 3 else "there", 9.0 - i) for i in range(5))
    found = list(groupings(every))
    assert len(found) == len(set(found))
    assert found[0] == (every,)
    assert (every[:3], every[3:]) in found
    assert {((fleet,),) for fleet in every} <= set(found)


GRAPH = model([10.0] + [20.0] * 22 + [30.0], parameters=2_000_000)


@pytest.mark.parametrize("order", get_args(Order))
def test_the_closed_form_is_near_the_simulator(order):
    costs = costs_of(GRAPH, machines(8, 8), job(256))
    context = template_search.estimate_context(costs, device_classes(costs), order)
    schedule = "gpipe" if order == "gpipe" else "1f1b"
    found = template_search._choices(context, float("inf"), lambda: False)
    choice = min(islice(found, 200), key=lambda each: each.seconds)
    plan = plan_of(costs, template_search._pipelines(choice, schedule), schedule)
    played = simulate_by_symmetry(plan, GRAPH, costs.cluster).step_seconds
    assert 0.75 < choice.seconds / played < 1.1


@settings(max_examples=portion(25))
@given(
    st.lists(st.sampled_from([1.0, 10.0, 70.0]), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from(("1f1b", "gpipe")),
    st.floats(0.98, 1.12),
)
def test_cuts_of_a_template_are_the_best_of_all_that_fit(layers, depth, count, schedule, memory):
    graph = model(layers, parameters=2_000_000, saved=5e6)
    costs = costs_of(graph, machines(1, 0, 4, memory=memory), job(count))
    context = template_search.estimate_context(costs, device_classes(costs), schedule)
    template = PipelineTemplate((StageRun(0, 1, depth, 1, 1),), 1)
    group = (next(iter(costs.devices)),)
    forward, backward = group_prefix(costs, group, 1)
    always, each = stage_bytes(costs, 1, 1)

    def slowest(bounds):
        return max(forward[b] - forward[a] + backward[b] - backward[a] for a, b in pairwise(bounds))

    def fits(bounds):
        return all(
            always[a, b] + each[a, b] * in_flight(schedule, s, depth, count)
            <= group_capacity(costs, group)
            for s, (a, b) in enumerate(pairwise(bounds))
        )

    inner = combinations(range(1, len(layers)), depth - 1)
    fitting = [bounds for bounds in ((0, *cut, len(layers)) for cut in inner) if fits(bounds)]
    found = cuts(context, template, count)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found in fitting
        assert slowest(found) == pytest.approx(min(map(slowest, fitting)))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("order", get_args(Order))
def test_balanced_stages_are_rated_hardly_slower_than_the_best_cuts(width, depth, order):
    """Gradients take most of the step: a ring passes 2 (w - 1) / w of them. With GPipe, which waits
    for no memory, it is seen that every stage of a round trip counts as the slowest: that of seven
    layers on two stages has eight."""
    graph = model([10.0] * 7, parameters=10_000_000)
    costs = costs_of(graph, machines(depth * width, 0, 1), job(8 * width))
    context = template_search.estimate_context(costs, device_classes(costs), order)
    builds = Builds((0,), (1,), np.array([[width]]), np.array([[1]]), np.array([width]))
    prices = build_prices(context, builds)
    (least,) = balanced(context, prices, 8 * width, np.array([0]), np.array([[depth]]))
    template = PipelineTemplate((StageRun(0, 1, depth, width, 1),), width)
    exact = whole_seconds(context, (estimate_template(context, template, 8),), (8,))
    assert 0.6 * exact < least < (1.06 if order == "gpipe" else 1.02) * exact


def test_what_is_scored_grows_by_the_kinds_of_nodes_not_by_the_devices(monkeypatch):
    """Ten times the nodes, and the batch with them: not ten times the pipelines to score."""
    scored = Counter()
    monkeypatch.setattr(template_builds, "balanced", lambda *given: count(*given))

    def count(*given):
        scored[many] += given[-1].shape[1]
        return balanced(*given)

    for many in (16, 160):
        list(strategies_of(model([10.0] * 12), machines(many, many), job(many * 16), 4))
    assert 0 < scored[160] < 3 * scored[16]


def test_every_class_of_a_pipeline_has_a_tensor_width_of_its_own():
    """Slow devices with little memory share every layer; fast ones need not."""
    where = machines(1, 1, 4)
    graph = model([10.0] * 6, parameters=10_000_000)
    costs = costs_of(graph, where, job(16))
    context = template_search.estimate_context(costs, device_classes(costs), "best")
    runs = StageRun(0, 1, 2, 2, 2), StageRun(1, 2, 1, 2, 2)
    template = PipelineTemplate(runs, 4)
    assert template.depth == 3
    assert template.devices == 2 * 2 + 2 * 2
    estimate = estimate_template(context, template, 4)
    stages = written(context.classes, template, {})
    fitted = fit_pipeline(costs, stages, 4, 4, "1f1b")
    assert [len(group) for stage in stages for group in stage] == [1, 1, 1, 1, 2, 2]
    exact = pipeline_prices(costs, replace(fitted.pipeline, bounds=estimate.bounds))
    for name in ("forward", "backward", "inputs", "weights"):
        assert getattr(estimate.prices, name) == pytest.approx(getattr(exact, name)), name
    assert tuple(estimate.prices.held) == tuple(exact.held)


def test_tensor_widths_of_the_holders_of_tied_parameters_divide_the_widest():
    graph = model([10.0] * 3, tied=True)
    costs = costs_of(graph, machines(1, 1, 6), job(16))
    context = template_search.estimate_context(costs, device_classes(costs), "best")
    for one, other, able in ((1, 1, True), (1, 2, True), (3, 1, True), (2, 3, False)):
        runs = StageRun(0, one, 1, 1, 1), StageRun(1, other, 1, 1, 1)
        found = estimate_template(context, PipelineTemplate(runs, 1), 16)
        assert (found is not None) == able


@pytest.mark.slow
@pytest.mark.heavy
def test_more_nodes_never_give_a_slower_plan():
    seconds = [
        find_plan(GRAPH, machines(fast, slow), job(512)).prediction.step_seconds
        for fast, slow in ((9, 0), (16, 0), (16, 16))
    ]
    assert all(b <= a * 1.001 for a, b in pairwise(seconds)), seconds
    assert seconds[-1] < 0.6 * seconds[0]


def test_a_device_more_in_every_node_costs_nothing():
    costs_of_nodes = [costs_of(GRAPH, machines(9, 0, each), job(512)) for each in (8, 9)]
    best = [
        next(template_search.template_strategies(costs, "best", Counter(), lambda: False))
        for costs in costs_of_nodes
    ]
    eight, nine = (
        candidate_seconds(costs, pipelines, "best")
        for costs, (_, pipelines) in zip(costs_of_nodes, best, strict=True)
    )
    assert nine <= eight * 1.001


@pytest.mark.heavy
@pytest.mark.slow
def test_a_large_cluster_is_used_better_than_by_hand_and_every_time_the_same():
    where = machines(8, 8)
    plan = find_plan(GRAPH, where, job(512))
    by_hand = baseline_plan("even", GRAPH, where, job(512)).prediction.step_seconds
    assert plan.prediction.step_seconds < 0.8 * by_hand
    assert dumps(plan) == dumps(find_plan(GRAPH, where, job(512)))
    assert any(other.name.startswith("even:") for other in plan.prediction.runners_up)
    validate_plan(plan, GRAPH, where)


def test_a_budget_ends_a_large_search_with_a_plan_or_says_that_it_was_too_short():
    in_haste = find_plan(GRAPH, machines(16, 16), job(512), budget_seconds=0.0)
    validate_plan(in_haste, GRAPH, machines(16, 16))
    assert in_haste.prediction.lower_bound_seconds > 0
    heavy = model([1.0] * 4, parameters=20_000_000_000)
    with pytest.raises(PlanError, match="budget"):
        find_plan(heavy, machines(16, 0), job(512), budget_seconds=0.0)
    with pytest.raises(FitError, match="none of which fits"):
        find_plan(heavy, machines(16, 0), job(512))


def test_a_budget_that_is_far_too_short_is_not_overrun_for_long(monkeypatch):
    """Where the search has found nothing in twice the time, the plain plan of its beginning is
    what there is."""
    where = machines(16, 16)
    clock = [0.0]

    def now():
        clock[0] += 1e-3
        return clock[0]

    monkeypatch.setattr("meshwright.search.incumbent.time.monotonic", now)
    plain = []
    plan = find_plan(GRAPH, where, job(512), budget_seconds=0.02, found=plain.append)
    validate_plan(plan, GRAPH, where)
    assert plan.prediction.step_seconds == plain[0]
    assert len(plain) == 1


def test_nodes_that_differ_in_their_links_alone_are_one_fleet_where_there_are_many():
    where = machines(12, 0)
    nodes = tuple(
        replace(node, network=Link(bandwidth=1e10 + i)) for i, node in enumerate(where.nodes)
    )
    few, many = replace(where, nodes=nodes[:4]), replace(where, nodes=nodes)
    assert len(device_classes(costs_of(GRAPH, few, job()))) == 4
    assert len(device_classes(costs_of(GRAPH, many, job()))) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=tenth(500), database=None)
@given(fleet_worlds())
def test_every_strategy_holds_every_layer_once_and_fits_in_many_cases(world):
    for plan in strategies_of(*world, most=12):
        validate_plan(plan, world[0], world[1])
        assert not memory_problems(plan, world[0], world[1])


def task_of(where, limit, batch=256):
    """Pipelines over all classes of a cluster, of replicas of one device."""
    costs = costs_of(model([10.0] * 24), where, job(batch))
    context = template_search.estimate_context(costs, device_classes(costs), "best")
    numbers = tuple(range(len(context.classes)))
    return template_builds.Task(context, numbers, (1,) * len(numbers), batch, True, limit)


def test_pipelines_whose_work_alone_takes_too_long_are_not_scored(monkeypatch):
    """The same templates are listed as if all were scored, from a fraction of the pipelines."""
    scored = Counter()

    def count(*given):
        scored[limit] += given[-1].shape[1]
        return balanced(*given)

    monkeypatch.setattr(template_builds, "balanced", count)
    limit = np.inf
    every = list(template_builds.scored_templates(task_of(machines(4, 4), limit)))
    limit = every[0][0]
    within = [each for each in every if each[0] < template_builds.SLACK * limit]
    assert list(template_builds.scored_templates(task_of(machines(4, 4), limit))) == within
    assert len(within) < scored[limit] < scored[np.inf] / 4


def at_sites_of_their_own(where):
    """The cluster with every node at another site."""
    nodes = tuple(replace(node, site=node.name) for node in where.nodes)
    sites = tuple(Site(name=node.name, uplink=where.sites[0].uplink) for node in nodes)
    return replace(where, nodes=nodes, sites=sites)


@pytest.mark.parametrize("sites", [2, 4])
def test_pipelines_of_like_sites_are_combined_once(sites):
    """Offers a, b on two sites that are alike give aa, ab and bb, not ba as well."""
    where = at_sites_of_their_own(machines(sites, 0))
    context = task_of(where, np.inf).context
    grouping = tuple((RatedClass(i, node.site, 1.0),) for i, node in enumerate(where.nodes))
    offers = [[f"a{i}", f"b{i}"] for i in range(sites)]
    found = list(template_search._combinations(context, grouping, offers))
    assert len(found) == len({tuple(sorted(each[0] for each in one)) for one in found}) == sites + 1


def test_pipelines_on_classes_that_are_alike_are_looked_for_once(monkeypatch):
    asked = Counter()
    offers = template_search._offers

    def count(task):
        if len(task.block) == 1:
            asked[task.context.order, task.tensors, task.share] += 1
        return offers(task)

    monkeypatch.setattr(template_search, "_offers", count)
    list(strategies_of(model([10.0] * 8), at_sites_of_their_own(machines(4, 0)), job(32), 1))
    assert asked
    assert max(asked.values()) == 1

"""Several stages on each device: legal, within memory, and only where they are faster."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.errors import FitError
from meshwright.plan.ranks import describe_plan, stage_layout
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.report.plan_drawing import plan_svg
from meshwright.report.sentences import limits
from meshwright.report.timeline_data import timeline_data
from meshwright.search.candidate import CandidatePipeline, plan_of
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.search.finishing import Pruned, finish
from meshwright.search.incumbent import Incumbent, simulate_and_record
from meshwright.search.options.virtual_stages import LAYOUTS, OPTION, DividedPlan, divided_plan
from meshwright.search.planner import find_plan
from meshwright.search.stage_devices import StageDevices
from meshwright.search.virtual_stage_partition import _seconds, _tables, cut_virtual_stages
from meshwright.simulate.simulator import simulate_plan
from soaks import portion
from worlds import cluster, device, job, model


def stages_held(plan: Plan) -> int:
    """Most stages on one device."""
    return max(len(held) for pipeline in plan.pipelines for held in stage_layout(pipeline))


@st.composite
def waiting_worlds(draw):
    """Few rows, and parameters that are dear to reduce: pipelines that wait."""
    count = draw(st.integers(2, 4))
    memory = draw(st.sampled_from([1.15, 1.3, 16.0]))
    types = (device("fast", 20.0, memory), device("slow", 10.0, draw(st.sampled_from([1.2, 16.0]))))
    nodes = draw(st.lists(st.sampled_from([("fast",), ("slow",)]), min_size=count, max_size=count))
    network = Link(bandwidth=draw(st.sampled_from([1e8, 1e9])), latency=1e-5)
    gflops = draw(st.lists(st.sampled_from([5.0, 10.0, 20.0]), min_size=4, max_size=10))
    parameters = draw(st.sampled_from([1_000_000, 10_000_000]))
    graph = model(gflops, parameters=parameters, tied=draw(st.booleans()))
    return graph, cluster(*nodes, network=network, types=types), job(draw(st.integers(1, 6)))


@pytest.mark.heavy
@settings(max_examples=portion(15), deadline=None)
@given(world=waiting_worlds())
def test_a_plan_with_stages_divided_is_legal_fits_and_is_never_slower(world):
    graph, where, todo = world
    try:
        found = find_plan(*world)
    except FitError:
        return
    assert (
        found.prediction.step_seconds
        <= find_plan(*world, forbidden=["virtual-stages"]).prediction.step_seconds
    )
    validate_plan(found, graph, where)
    check_program(compile_plan(found, graph))
    assert all(total_bytes(m) <= m.capacity for m in device_memory(found, graph, where))
    assert certificate(costs_of(graph, where, todo)).seconds <= found.prediction.step_seconds
    whole = simulate_plan(found, graph, where).step_seconds
    assert whole == pytest.approx(found.prediction.step_seconds, rel=1e-9)


@pytest.mark.heavy
def test_tied_ends_are_folded_onto_one_device():
    """The table of first and last layer needs no network when one device holds both."""
    graph = model([10.0] * 12, parameters=10_000_000, tied=True)
    slow = Link(bandwidth=1e8, latency=1e-5)
    where = cluster(("slow",), ("slow",), ("slow",), ("slow",), network=slow)
    found = find_plan(graph, where, job(4))
    plain = find_plan(graph, where, job(4), forbidden=["virtual-stages"])
    assert stages_held(found) == 2
    assert stages_held(plain) == 1
    assert found.name.endswith("-vpp2")
    assert found.prediction.step_seconds < 0.9 * plain.prediction.step_seconds
    first, *_, last = found.pipelines[0].stages
    assert first.devices == last.devices
    assert any(r.name.startswith("dp1 tp1 pp4 [") for r in found.prediction.runners_up)
    assert describe_plan(found).startswith("dp1 tp1 pp4 vpp2 [")
    assert "The first devices hold its last layers too" in limits(found)[-1]
    assert "a:0, slow: rank 0, stages 0, 7 , l0" in plan_svg(found, where, graph)
    ranks = timeline_data([simulate_plan(found, graph, where)], where, found)["ranks"]
    assert ranks[0] == {"device": "a:0", "type": "slow", "stage": "0, 7"}
    assert found == find_plan(graph, where, job(4))


def pipeline_plan(costs, kinds: str, layers: int, micro_batches: int, rows: int = 1) -> Plan:
    """One pipeline on the devices of a cluster in their order, equally many layers on each."""
    names = list(costs.devices)
    cuts = tuple(round(layers * s / len(kinds)) for s in range(len(kinds) + 1))
    teams = tuple(StageDevices(((name,),), (rows,)) for name in names)
    return plan_of(costs, [CandidatePipeline(teams, cuts, micro_batches)], "1f1b")


@pytest.mark.parametrize(("schedule", "chunks"), LAYOUTS)
@pytest.mark.parametrize("memory", [16.0, 1.5])
def test_every_layout_is_dealt_out_by_speed_and_memory(schedule, chunks, memory):
    graph = model([10.0] * 24, parameters=1_000_000, saved=2e7)
    types = (device("fast", 20.0, memory), device("slow", 10.0, 16.0))
    where = cluster(("fast", "fast"), ("slow",), types=types)
    costs = costs_of(graph, where, job(8))
    plan = pipeline_plan(costs, "ffs", 24, 8)
    found = divided_plan(costs, plan, schedule, chunks)
    assert isinstance(found, DividedPlan)
    divided = found.plan
    validate_plan(divided, graph, where)
    check_program(compile_plan(divided, graph))
    assert all(total_bytes(m) <= m.capacity for m in device_memory(divided, graph, where))
    (pipeline,) = divided.pipelines
    held = [
        sum(b - a for a, b in (pipeline.stages[k].layers for k in group))
        for group in stage_layout(pipeline)
    ]
    assert len(held) == 3
    if memory > 2:
        assert held[0] + held[1] >= 3.5 * held[2]
    else:
        assert held[2] > 24 / 5


def test_what_cannot_be_divided_says_why():
    graph, where = model([10.0] * 5, parameters=100_000_000), cluster(("slow",), ("slow",))
    costs = costs_of(graph, where, job(4))
    plan = pipeline_plan(costs, "ss", 5, 4)
    assert divided_plan(costs, plan, "interleaved-1f1b", 4) == Pruned("impossible for this plan")
    assert divided_plan(costs, plan, "zb-v", 2, limit=1e-9) == Pruned("slower in closed form")
    tight = cluster(("slow",), ("slow",), types=(device("slow", 10.0, 2.0),))
    assert divided_plan(costs_of(graph, tight, job(4)), plan, "zb-v", 2) == Pruned(
        "does not fit in memory"
    )


@settings(max_examples=portion(30), deadline=None)
@given(
    gflops=st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=6, max_size=9),
    schedule=st.sampled_from(["interleaved-1f1b", "zb-v"]),
    micro_batches=st.integers(1, 8),
)
def test_cuts_are_near_the_best_of_all(gflops, schedule, micro_batches):
    graph, where = model(gflops), cluster(("fast",), ("slow",))
    costs = costs_of(graph, where, job(micro_batches))
    teams = tuple(StageDevices(((name,),), (1,)) for name in costs.devices)
    line = CandidatePipeline(teams, (0, 3, len(gflops)), micro_batches)
    layout = ((0, 2), (1, 3)) if schedule != "zb-v" else ((0, 3), (1, 2))
    bounds, seconds = cut_virtual_stages(costs, line, layout, schedule, frozenset())
    every = np.array([(0, *c, len(gflops)) for c in combinations(range(1, len(gflops)), 3)])
    best = _seconds(_tables(costs, line, layout, schedule, frozenset()), every).min()
    assert list(bounds) == sorted(set(bounds))
    assert best * (1 - 1e-12) <= seconds <= best * 1.3


def test_cuts_on_machines_twice_as_slow_take_twice_as_long():
    costs = costs_of(model([10.0] * 6), cluster(("fast",), ("slow",)), job(4))
    teams = tuple(StageDevices(((name,),), (1,)) for name in costs.devices)
    line = CandidatePipeline(teams, (0, 3, 6), 4)
    tables = _tables(costs, line, ((0, 2), (1, 3)), "interleaved-1f1b", frozenset())
    bounds = np.array([(0, 1, 3, 4, 6), (0, 2, 3, 5, 6)])
    slower = replace(tables, loads=2 * tables.loads, cuts=2 * tables.cuts)
    assert _seconds(slower, bounds) == pytest.approx(2 * _seconds(tables, bounds))


def test_the_time_that_is_up_leaves_the_best_plan_so_far():
    graph = model([10.0] * 12, parameters=10_000_000, tied=True)
    where = cluster(("slow",), ("slow",), ("slow",), network=Link(bandwidth=1e8, latency=1e-5))
    costs = costs_of(graph, where, job(4))
    incumbent = Incumbent(costs, "", deadline=0.0)
    plan = pipeline_plan(costs, "sss", 12, 4)
    simulate_and_record(incumbent, plan, "given")
    told = []
    finish(incumbent, [OPTION], lambda *news: told.append(news))
    assert incumbent.best.plan == plan
    assert incumbent.pruned["virtual-stages: beyond the budget"] == 1
    assert told[-1] == ("trying virtual stages", 1, 1)
    incumbent.deadline = None
    finish(incumbent, [OPTION], lambda *_: None)
    assert stages_held(incumbent.best.plan) == 2
    assert replace(incumbent.best.plan, prediction=None) == incumbent.best.plan

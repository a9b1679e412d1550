"""The closed form: exact where hands can check it, near the simulator elsewhere."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link, devices_of
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.pricing import price_program
from meshwright.program.compile import compile_plan
from meshwright.search.costs import costs_of
from meshwright.search.estimate import (
    Candidate,
    Estimate,
    Misfit,
    chain,
    evaluate,
    optimistic_seconds,
    step_seconds,
)
from meshwright.search.explain import as_plan
from meshwright.search.explore import candidates_of
from meshwright.search.grid_memory import fitting_loads, memory_of
from meshwright.search.layer_partition import assign, chain_loads
from meshwright.search.placement import placements
from meshwright.search.space import DeviceSet, Grid, Shape, grids, shapes
from meshwright.simulate.simulator import simulate
from soaks import portion
from worlds import FAST, GIB, SLOW, cluster, device, job, model

SPEED = {"fast": 2.0, "slow": 1.0}


@st.composite
def candidates(draw):
    """A cost table and one strategy out of its whole space."""
    per_node = draw(st.sampled_from([1, 2, 4]))
    kinds = [(draw(st.sampled_from(["fast", "slow"])),) * per_node for _ in range(2)]
    memory = draw(st.sampled_from([1.3, 2.0, 16.0]))
    types = tuple(replace(kind, memory=int(memory * GIB)) for kind in (FAST, SLOW))
    where = cluster(*kinds, types=types)
    graph = model(
        draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=2, max_size=6)),
        parameters=draw(st.sampled_from([100_000, 20_000_000])),
        tied=draw(st.booleans()),
        saved=draw(st.sampled_from([1e6, 5e7])),
    )
    todo = job(draw(st.sampled_from([4, 8])))
    costs = costs_of(graph, where, todo)
    devices = devices_of(where)
    grid = draw(st.sampled_from(grids(devices, graph, todo, Counter())))
    shape = draw(st.sampled_from(list(shapes(grid, todo, ("1f1b", "gpipe")))))
    place = draw(st.sampled_from(placements(devices, grid, SPEED)))
    return costs, Candidate(DeviceSet(devices=devices), place, shape)


@settings(max_examples=portion(60))
@given(candidates())
def test_no_candidate_beats_its_lower_bound(case):
    costs, candidate = case
    found = evaluate(costs, candidate)
    if isinstance(found, Estimate):
        assert optimistic_seconds(costs, candidate) <= found.seconds * (1 + 1e-12)


def test_the_lower_bound_of_one_stage_is_all_that_it_computes():
    """Five micro-batches of 30 GFLOP forward and twice that backward, at 20 TFLOP/s."""
    costs = costs_of(model([10.0, 20.0]), cluster(("fast",)), job(5))
    candidate = next(
        each
        for each in candidates_of(costs, ("1f1b",), Counter())
        if (each.shape.rows, each.shape.micro_batches) == (1, 5)
    )
    least = optimistic_seconds(costs, candidate)
    assert least == pytest.approx(5 * 3 * 30e9 / 20e12, rel=1e-3)


@settings(max_examples=portion(60))
@given(candidates())
def test_what_is_said_to_fit_fits_and_what_is_not_never_does(case):
    costs, candidate = case
    found = evaluate(costs, candidate)
    count, stages = len(costs.model.layers), candidate.shape.grid.stages
    every = (
        [found.bounds]
        if isinstance(found, Estimate)
        else [(0, *inner, count) for inner in itertools.combinations(range(1, count), stages - 1)]
    )
    worst = []
    for bounds in every:
        memory = device_memory(as_plan(costs, candidate, bounds, ""), costs.model, costs.cluster)
        worst.append(max(total_bytes(m) - m.capacity for m in memory))
    if isinstance(found, Misfit):
        assert min(worst) == pytest.approx(found.excess_bytes, abs=16)
    else:
        assert worst[0] <= 0


@settings(max_examples=portion(60))
@given(candidates())
def test_the_closed_form_is_near_the_simulator(case):
    """Within a quarter: it leaves out how single transfers queue."""
    costs, candidate = case
    found = evaluate(costs, candidate)
    if isinstance(found, Estimate):
        plan = as_plan(costs, candidate, found.bounds, "")
        program = compile_plan(plan, costs.model)
        simulated = simulate(
            program, price_program(program, plan, costs.model, costs.cluster)
        ).step_seconds
        assert found.seconds == pytest.approx(simulated, rel=0.25)


@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_equal_stages_take_the_textbook_time(micro_batches):
    """(M + S - 1) rounds, next to nothing else: instant links, hardly any parameters."""
    where = cluster(("fast",) * 4)
    instant = Link(bandwidth=1e15, latency=0.0)
    where = replace(where, nodes=(replace(where.nodes[0], inside=instant),))
    graph = model([200.0] * 8, parameters=1)
    costs = costs_of(graph, where, job(8))
    grid = Grid(data=1, tensor=1, stages=4)
    shape = Shape(grid=grid, rows=8 // micro_batches, micro_batches=micro_batches, schedule="1f1b")
    devices = devices_of(where)
    place = placements(devices, grid, SPEED)[0]
    found = evaluate(costs, Candidate(DeviceSet(devices=devices), place, shape))
    round_seconds = 2 * 3 * 200e9 * shape.rows / 20e12
    assert found.bounds == (0, 2, 4, 6, 8)
    assert found.seconds == pytest.approx((micro_batches + 3) * round_seconds, rel=1e-3)


def test_a_stage_of_fast_devices_takes_more_layers():
    where = cluster(("fast",), ("slow",))
    costs = costs_of(model([100.0] * 9), where, job(64))
    grid = Grid(data=1, tensor=1, stages=2)
    shape = Shape(grid=grid, rows=1, micro_batches=64, schedule="gpipe")
    devices = devices_of(where)
    place = placements(devices, grid, SPEED)[0]
    found = evaluate(costs, Candidate(DeviceSet(devices=devices), place, shape))
    assert found.bounds == (0, 6, 9)


def test_a_mixed_stage_goes_at_its_slowest_replicas_pace():
    where = cluster(("fast", "slow"))
    costs = costs_of(model([100.0] * 4), where, job(8))
    grid = Grid(data=2, tensor=1, stages=1)
    shape = Shape(grid=grid, rows=1, micro_batches=4, schedule="1f1b")
    devices = devices_of(where)
    mixed = Candidate(DeviceSet(devices=devices), placements(devices, grid, SPEED)[0], shape)
    assert chain(costs, mixed).forward[0] == pytest.approx(np.full(4, 100e9 / 10e12))


@pytest.mark.parametrize(("bounds", "fits"), [((0, 1, 4), False), ((0, 2, 4), True)])
def test_given_cuts_are_kept_and_weighed(bounds, fits):
    """160 MB of states a layer; the device has room for two layers."""
    where = cluster(("fast",) * 2, types=(device("fast", memory_gib=1.4),))
    costs = costs_of(model([10.0] * 4, parameters=10_000_000), where, job(4))
    grid = Grid(data=1, tensor=1, stages=2)
    shape = Shape(grid=grid, rows=1, micro_batches=4, schedule="1f1b")
    devices = devices_of(where)
    place = placements(devices, grid, {"fast": 1.0})[0]
    found = evaluate(costs, Candidate(DeviceSet(devices=devices), place, shape, bounds))
    assert found.bounds == bounds
    assert isinstance(found, Estimate) == fits


def test_of_equally_balanced_cuts_one_with_lighter_ends_is_taken():
    """Eight stages, 24 equal layers and a dear head, a table tied to both ends: some stage has to
    take four layers, but the first one, which has the table to reduce, had better take few."""
    where = cluster(("fast",) * 8, ("fast",) * 8)
    where = replace(where, nodes=tuple(replace(n, inside=n.network) for n in where.nodes))
    graph = model([1e-6, *[100.0] * 24, 200.0], parameters=12_000_000, tied=True)
    graph = replace(graph, tied=(replace(graph.tied[0], parameters=50_000_000),))
    costs = costs_of(graph, where, job(32))
    grid = Grid(data=2, tensor=1, stages=8)
    shape = Shape(grid=grid, rows=1, micro_batches=16, schedule="1f1b")
    devices = devices_of(where)
    place = placements(devices, grid, SPEED)[0]
    candidate = Candidate(DeviceSet(devices=devices), place, shape)
    facts = chain(costs, candidate)
    loads = chain_loads(facts.forward + facts.backward)
    balanced = assign(list(loads), facts.forward_cut + facts.backward_cut, 16)
    found = evaluate(costs, candidate)
    assert found.bounds[1] < balanced.bounds[1]
    assert found.seconds < 0.95 * step_seconds(costs, candidate, balanced.bounds, facts)


def test_stages_that_are_alike_share_the_table_of_their_layers():
    """Eight stages of two kinds that hold as many micro-batches have two tables: their number grows
    with the kinds of devices, not with the stages."""
    where = cluster(("fast",) * 4, ("slow",) * 4)
    costs = costs_of(model([100.0] * 16), where, job(32))
    devices, grid = devices_of(where), Grid(data=1, tensor=1, stages=8)
    shape = Shape(grid=grid, rows=1, micro_batches=32, schedule="gpipe")
    place = placements(devices, grid, SPEED)[0]
    memory = memory_of(costs, place, shape)
    loads = fitting_loads(costs, place, shape, memory)
    assert [id(own) for own in loads] == [id(loads[0])] * 4 + [id(loads[4])] * 4
    assert loads[0] is not loads[4]

"""Layers are cut into stages as well as can be."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Link, devices_of
from meshwright.program.schedules import in_flight
from meshwright.search.costs import costs_of
from meshwright.search.layer_partition import (
    PRECISE,
    ROOMY,
    chain_loads,
    cut_seconds,
    least_worst,
    recut,
    stage_loads,
)
from meshwright.search.stage_devices import StageDevices
from soaks import portion
from worlds import FAST, GIB, SLOW, cluster, device, job, model


def names_of(where):
    return [device.name for device in devices_of(where)]


def every_bounds(layers, stages):
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def within(loads, need, capacity):
    """Loads that forbid every range that needs more than a stage has."""
    return np.where(need <= capacity[:, None, None], loads, np.inf)


@st.composite
def problems(draw):
    """Stages of their own speeds, memory that forbids some ranges."""
    layers = draw(st.integers(1, 8))
    stages = draw(st.integers(1, min(4, layers)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rough = draw(st.booleans())
    times = random.integers(0, 4, (stages, layers)) if rough else random.random((stages, layers))
    need = np.abs(np.subtract.outer(np.arange(layers + 1.0), np.arange(layers + 1.0)))
    capacity = random.integers(1, layers + 1, stages).astype(float)
    return within(chain_loads(times.astype(float)), need, capacity)


@settings(max_examples=portion(100))
@given(problems())
def test_least_worst_is_the_smallest_largest_load(loads):
    worst = {
        bounds: max(loads[s, a, b] for s, (a, b) in enumerate(itertools.pairwise(bounds)))
        for bounds in every_bounds(loads.shape[1] - 1, loads.shape[0])
    }
    found = least_worst(list(loads))
    if found is None:
        assert not np.isfinite(min(worst.values()))
    else:
        assert found[1] == worst[found[0]] == min(worst.values())


@st.composite
def pipelines(draw):
    """Two or three stages on unlike devices that may lack memory, and a slow network."""
    kinds = draw(st.lists(st.sampled_from(["fast", "slow"]), min_size=2, max_size=3))
    memory = draw(st.sampled_from([1.2, 1.5, 16.0]))
    network = Link(bandwidth=draw(st.sampled_from([1e7, 1e9, 1e11])), latency=1e-5)
    types = tuple(replace(kind, memory=int(memory * GIB)) for kind in (FAST, SLOW))
    where = cluster(*((kind,) for kind in kinds), types=types, network=network)
    layers = draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=3, max_size=7))
    graph = model(layers, parameters=draw(st.sampled_from([1000, 5_000_000])))
    stages = tuple(StageDevices(((name,),), (2,)) for name in names_of(where))
    return costs_of(graph, where, job(64)), stages, draw(st.integers(1, 12))


@settings(max_examples=portion(100))
@given(pipelines(), st.sampled_from(["1f1b", "gpipe"]))
def test_cuts_of_a_pipeline_are_about_the_best_of_all_that_fit(pipeline, schedule):
    """M - 1 times the slowest stage, and all stages and cuts once: no cuts whose slowest stage is
    about as fast as can be are better by more than a thousandth, and no stage is slower than that
    by more than a tenth."""
    costs, stages, count = pipeline
    loads = [
        stage_loads(costs, stage, held=in_flight(schedule, s, len(stages), count))
        for s, stage in enumerate(stages)
    ]
    crossing = [cut_seconds(costs, *pair) for pair in itertools.pairwise(stages)]
    every = {}
    for bounds in every_bounds(len(costs.model.layers), len(stages)):
        own = [loads[s][a, b] for s, (a, b) in enumerate(itertools.pairwise(bounds))]
        cuts = sum(crossing[s][cut] for s, cut in enumerate(bounds[1:-1]))
        every[bounds] = max(own), sum(own) + cuts
    found = recut(costs, stages, count, schedule)
    least = min(slowest for slowest, _ in every.values())
    if not np.isfinite(least):
        assert found is None
        return
    assert (found.slowest, found.once) == pytest.approx(every[found.pipeline.bounds])
    assert found.slowest <= least * ROOMY * (1 + PRECISE)
    seconds = (count - 1) * found.slowest + found.once
    for slowest, once in every.values():
        if slowest <= least * (1 + 1e-12):
            assert seconds <= ((count - 1) * slowest + once) * (1 + PRECISE)


def cut(gflops, *, memory=16.0, parameters=1000, count=100):
    """The cuts of two stages, the first on a device twice as fast."""
    types = (replace(FAST, memory=int(memory * GIB)), SLOW)
    where = cluster(("fast",), ("slow",), types=types)
    costs = costs_of(model(gflops, parameters=parameters), where, job(count))
    stages = tuple(StageDevices(((name,),), (1,)) for name in names_of(where))
    found = recut(costs, stages, count, "1f1b")
    return found and found.pipeline.bounds


def test_a_stage_twice_as_fast_takes_twice_the_layers():
    assert cut([100.0] * 9) == (0, 6, 9)


def test_memory_moves_layers_to_the_slower_stage():
    """160 MB of states a layer: the fast device has room for four."""
    assert cut([100.0] * 9, memory=1.65, parameters=10_000_000) == (0, 4, 9)


def test_more_stages_than_layers_cannot_be_cut():
    assert cut([100.0]) is None


def test_a_hundred_layers_on_sixteen_unlike_stages_are_cut_in_a_blink():
    where = cluster(("fast",) * 8, ("slow",) * 8)
    random = np.random.default_rng(0)
    graph = model([float(each) for each in 10 * (1 + 0.2 * random.random(100))])
    costs = costs_of(graph, where, job(32))
    stages = tuple(StageDevices(((name,),), (1,)) for name in names_of(where))
    start = time.process_time()
    found = recut(costs, stages, 32, "1f1b")
    assert time.process_time() - start < 1.0
    assert found is not None


def test_stages_that_are_alike_share_the_table_of_their_layers():
    """Eight stages of two kinds that hold as many micro-batches have two tables: their number grows
    with the kinds of devices, not with the stages."""
    where = cluster(("fast",) * 4, ("slow",) * 4)
    costs = costs_of(model([100.0] * 16), where, job(32))
    stages = [StageDevices(((name,),), (1,)) for name in names_of(where)]
    loads = [stage_loads(costs, stage, held=32) for stage in stages]
    assert [id(own) for own in loads] == [id(loads[0])] * 4 + [id(loads[4])] * 4
    assert loads[0] is not loads[4]


def test_layers_that_fit_only_if_recomputed_take_their_forward_twice():
    """All but the last layer, whose backward follows its forward at once."""
    gflops = [10.0, 20.0, 30.0, 40.0]
    where = cluster(("fast",), types=(device("fast", memory_gib=1.1),))
    costs = costs_of(model(gflops, parameters=1000, saved=5e7), where, job(8), recomputation=True)
    stage = StageDevices(((next(iter(costs.devices)),),), (1,))
    loads = stage_loads(costs, stage, held=1)
    each = np.array([loads[n, n + 1] for n in range(4)])
    assert loads[0, 2] == pytest.approx(each[:2].sum())
    assert loads[0, 4] == pytest.approx(each.sum() + each[:3].sum() / 3)

"""The layer assignment is exact."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.search.candidate import StageDevices
from meshwright.search.costs import costs_of
from meshwright.search.layer_partition import (
    assign,
    can_hold,
    chain_loads,
    least_worst,
    stage_loads,
)
from soaks import portion
from worlds import cluster, device, job, model


def seconds_of(loads, cuts, micro_batches, bounds):
    stages = [loads[s, a, b] for s, (a, b) in enumerate(itertools.pairwise(bounds))]
    crossing = [cuts[s, cut] for s, cut in enumerate(bounds[1:-1])]
    if not np.isfinite(stages).all():
        return np.inf
    return (micro_batches - 1) * max(stages) + sum(stages) + sum(crossing)


def every_bounds(layers, stages):
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def within(loads, need, capacity):
    """Loads that forbid every range that needs more than a stage has."""
    return np.where(need <= capacity[:, None, None], loads, np.inf)


@st.composite
def problems(draw):
    """Stages of their own speeds, boundaries of any cost, memory that forbids some ranges."""
    layers = draw(st.integers(1, 8))
    stages = draw(st.integers(1, min(4, layers)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rough = draw(st.booleans())
    times = random.integers(0, 4, (stages, layers)) if rough else random.random((stages, layers))
    cuts = random.integers(0, 5, (stages - 1, layers + 1)) * draw(st.sampled_from([0, 0.3, 2.0]))
    need = np.abs(np.subtract.outer(np.arange(layers + 1.0), np.arange(layers + 1.0)))
    capacity = random.integers(1, layers + 1, stages).astype(float)
    loads = within(chain_loads(times.astype(float)), need, capacity)
    return loads, cuts, draw(st.integers(1, 12))


@settings(max_examples=portion(300))
@given(problems())
def test_nothing_beats_the_assignment(problem):
    loads, cuts, micro_batches = problem
    layers = loads.shape[1] - 1
    every = {b: seconds_of(*problem, b) for b in every_bounds(layers, loads.shape[0])}
    found = assign(list(loads), cuts, micro_batches)
    if not np.isfinite(min(every.values())):
        assert found is None
        return
    assert found.seconds == pytest.approx(min(every.values()), rel=1e-12, abs=1e-12)
    assert every[found.bounds] == pytest.approx(found.seconds, rel=1e-12, abs=1e-12)
    assert found.slowest == max(
        loads[s, a, b] for s, (a, b) in enumerate(itertools.pairwise(found.bounds))
    )


@settings(max_examples=portion(100))
@given(problems())
def test_least_worst_is_the_smallest_largest_load(problem):
    loads, _, _ = problem
    worst = {
        bounds: max(loads[s, a, b] for s, (a, b) in enumerate(itertools.pairwise(bounds)))
        for bounds in every_bounds(loads.shape[1] - 1, loads.shape[0])
    }
    found = least_worst(list(loads))
    assert can_hold(list(loads)) == (found is not None)
    if found is None:
        assert not np.isfinite(min(worst.values()))
    else:
        assert found[1] == worst[found[0]] == min(worst.values())


def test_a_stage_twice_as_fast_takes_twice_the_layers():
    times = np.array([[1.0] * 9, [2.0] * 9])
    assert assign(list(chain_loads(times)), np.zeros((1, 10)), 100).bounds == (0, 6, 9)


def test_memory_moves_layers_to_the_slower_stage():
    times = np.array([[1.0] * 9, [2.0] * 9])
    need = np.abs(np.subtract.outer(np.arange(10.0), np.arange(10.0)))
    loads = within(chain_loads(times), need, np.array([4.0, 9.0]))
    assert assign(list(loads), np.zeros((1, 10)), 100).bounds == (0, 4, 9)


def test_more_stages_than_layers_cannot_be_assigned():
    assert assign(list(chain_loads(np.ones((3, 2)))), np.zeros((2, 3)), 4) is None


def test_a_hundred_layers_on_sixteen_unlike_stages_are_assigned_in_a_blink():
    random = np.random.default_rng(0)
    speed = np.repeat([1.0, 2.6], 8)[:, None]
    loads = chain_loads(speed * (1 + 0.2 * random.random(100)))
    cuts = random.random((15, 101))
    start = time.process_time()
    found = assign(list(loads), cuts, 32)
    assert time.process_time() - start < 1.0
    assert found is not None


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

"""AMP's algorithm: the fast form against its recurrence written out, the record where it is."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.rivals import amp
from soaks import portion

DATA = os.environ.get("MESHWRIGHT_AMP_DATA", "")


def literal(times, cuts, stages, micro_batches):
    """AMP's recurrence, word for word: no sharing, no tables."""
    weight = micro_batches - 1

    def f(i, j, m):
        if j == 0:
            return weight * max(0.0, sum(times[: i + 1]) - m), [i + 1]
        best, sizes = float("inf"), []
        for cut in range(j - 1, i):
            load = sum(times[cut + 1 : i + 1])
            value, before = f(cut, j - 1, max(load, m))
            value = value + weight * max(0.0, load - m) + cuts[cut][j - 1]
            if value < best:
                best, sizes = value - cuts[cut][j - 1], [*before, i - cut]
        return best, sizes

    return tuple(f(len(times) - 1, stages - 1, 0.0)[1])


@st.composite
def chains(draw, most_layers=8):
    """Times and boundary seconds that are exact in binary, so that ties are real ties."""
    layers = draw(st.integers(2, most_layers))
    stages = draw(st.integers(1, min(4, layers)))
    quarter = st.integers(0, 12).map(lambda n: n / 4)
    times = draw(st.lists(quarter, min_size=layers, max_size=layers))
    cuts = draw(
        st.lists(
            st.lists(quarter, min_size=stages - 1, max_size=stages - 1),
            min_size=layers - 1,
            max_size=layers - 1,
        )
    )
    shape = (layers - 1, stages - 1)
    return np.array(times), np.array(cuts).reshape(shape), stages, draw(st.integers(2, 9))


@settings(max_examples=portion(200))
@given(chains())
def test_the_tables_give_what_the_recurrence_gives(chain):
    assert amp.assign_faithfully(*chain) == literal(*chain)


def test_the_subtracted_boundary_makes_amp_miss_its_optimum():
    """Three equal layers, two stages: the first cut costs 2, the second nothing. AMP remembers the
    first as if it were free, and the second no longer beats it."""
    times, cuts = np.array([1.0, 1.0, 1.0]), np.array([[2.0], [0.0]])
    faithful = amp.assign_faithfully(times, cuts, 2, 2)
    assert faithful == (1, 2)
    assert amp.pipeline_seconds(times, cuts, faithful, 2) == 7.0
    assert amp.pipeline_seconds(times, cuts, (2, 1), 2) == 5.0


def cluster(*nodes, devices=2):
    return amp.AmpCluster(
        devices_per_node=devices,
        nodes=tuple(amp.AmpNode(network=n, inside=i) for n, i in nodes),
    )


def model(forward, **changes):
    entries = len(forward)
    fields = {
        "forward_seconds": {1: tuple(forward), 2: tuple(t / 2 for t in forward)},
        "assigned": tuple(range(entries)),
        "uniform": (0, entries, 0),
        "boundary_words": {1: (10.0,) * entries, 2: (10.0,) * entries},
        "parameter_words": (100.0,) * entries,
    }
    return amp.AmpModel(**(fields | changes))


def test_the_space_is_ordered_by_micro_batch_then_tensor_then_data():
    found = amp.strategies(cluster((1, 1), (1, 1)), 4)
    assert [(s.micro_batch, s.tensor, s.data, s.stages) for s in found[:6]] == [
        (1, 1, 1, 4),
        (1, 1, 2, 2),
        (1, 1, 4, 1),
        (1, 2, 1, 2),
        (1, 2, 2, 1),
        (2, 1, 1, 4),
    ]
    assert len(found) == 3 + 2 + 1 + 3 + 2


def test_only_strategies_whose_data_width_divides_the_batch_are_enumerated():
    found = amp.strategies(cluster((1, 1), (1, 1), (1, 1)), 4)
    assert {s.data for s in found} == {1, 2}


def test_a_boundary_takes_the_slower_network_averaged_over_replicas():
    """Stage 0 is ranks 0, 1 on node 0; stage 1 ranks 2, 3 on node 1; 20 words a cut."""
    where = cluster((4.0, 40.0), (2.0, 80.0))
    strategy = amp.Strategy(tensor=1, data=2, stages=2, micro_batch=2)
    assert amp.boundary_seconds(model([1, 1, 1]), where, strategy) == pytest.approx(20 / 2.0)
    inside = amp.Strategy(tensor=1, data=1, stages=4, micro_batch=2)
    assert amp.boundary_seconds(model([1, 1, 1, 1]), where, inside)[0] == pytest.approx(
        [20 / 40, 20 / 2, 20 / 80]
    )


def test_a_ring_is_charged_at_the_pair_that_closes_it():
    """Ranks 0..3: the ring closes from rank 3 on node 1 back to rank 0 on node 0."""
    where = cluster((4.0, 40.0), (2.0, 80.0))
    strategy = amp.Strategy(tensor=1, data=4, stages=1, micro_batch=1)
    seconds = amp.data_seconds(model([1, 1]), where, strategy, (0, 2))
    assert seconds == pytest.approx(2 * 3 / 4 * 200 / 2.0)


def test_embeddings_are_charged_once_per_stage_that_holds_any():
    where = cluster((1.0, 1.0), (1.0, 1.0))
    strategy = amp.Strategy(tensor=1, data=2, stages=2, micro_batch=1)
    tied = model([1, 1, 1], embedding_words=1000.0, embeddings=(0, 1))
    assert amp.data_seconds(tied, where, strategy, (0, 2, 3)) == pytest.approx(1200.0)
    assert amp.data_seconds(tied, where, strategy, (0, 1, 3)) == pytest.approx(1200.0)


def test_one_micro_batch_is_cut_evenly_whatever_the_times():
    uneven = model([5.0, 0.1, 0.1, 0.1, 0.1], uniform=(1, 3, 1))
    strategy = amp.Strategy(tensor=1, data=1, stages=2, micro_batch=4)
    found = amp.predict(uneven, cluster((1e9, 1e9)), strategy, 4)
    assert found.bounds == (0, 3, 5)
    assert found.seconds == pytest.approx(3 * 4 * 5.4, rel=1e-6)


def test_the_ranking_ascends_and_leaves_out_pipes_longer_than_the_model():
    found = amp.rank(model([1.0, 2.0]), cluster((1.0, 5.0), (1.0, 5.0)), 4)
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    assert {p.strategy.stages for p in found} == {1, 2}


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "amp_recorded.py"
    spec = importlib.util.spec_from_file_location("amp_recorded", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["amp_recorded"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(
    not DATA, reason="MESHWRIGHT_AMP_DATA does not name the folder of AMP's records"
)
@pytest.mark.parametrize("name", ["homogeneous_trials", "het_model_trials"])
def test_recorded_predictions_come_out_again(name):
    found = benchmark().compare(Path(DATA), name)
    assert found.holds
    assert found.spearman == pytest.approx(1.0, abs=1e-9)
    assert found.seconds < 5.0

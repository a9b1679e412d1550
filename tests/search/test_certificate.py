"""No plan is faster than its certificate, on whatever links it runs and however its backwards are
cut in two."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, DirectLink, Link, Node, Site, devices_of
from meshwright.cost.collective import all_reduce
from meshwright.cost.memory import usable_bytes
from meshwright.cost.profile import LayerTime, Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Prediction
from meshwright.search.certificate import (
    CHAIN,
    EXHAUSTIVE,
    LAST,
    certificate,
    certificate_in_haste,
    fluid_seconds,
    least_ring_seconds,
    sentence,
)
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan
from meshwright.stopping import Stopped, stoppable
from meshwright.techniques.backward_split.price import SPLIT_COST
from soaks import portion
from worlds import FAST, SLOW, cluster, job, model

latencies = st.sampled_from([0.0, 1e-6, 2e-5, 3e-4, 2e-3])


@st.composite
def wired(draw) -> Cluster:
    """Nodes whose networks may be quicker than what is inside them, at one site or two, perhaps
    with explicit links."""
    nodes = tuple(
        Node(
            name=f"n{i}",
            site=draw(st.sampled_from(["here", "there"])),
            devices=("fast",) * draw(st.integers(1, 3)),
            inside=Link(bandwidth=1e10, latency=draw(latencies)),
            network=Link(bandwidth=1e9, latency=draw(latencies)),
        )
        for i in range(draw(st.integers(1, 4)))
    )
    uplinks = st.none() | st.builds(Link, bandwidth=st.just(1e9), latency=latencies)
    pairs = [(a.name, b.name) for a in nodes for b in nodes if a.name < b.name]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    wire = Link(bandwidth=1e9, latency=draw(latencies))
    return Cluster(
        name="wired",
        types={"fast": FAST},
        nodes=nodes,
        sites=tuple(Site(name=name, uplink=draw(uplinks)) for name in ("here", "there")),
        direct=tuple(DirectLink(between=pair, link=wire) for pair in chosen),
    )


@settings(max_examples=portion(200))
@given(wired(), st.data())
def test_no_ring_of_so_many_devices_is_quicker_than_the_least(where, data):
    costs = costs_of(model([1.0]), where, job())
    names = [device.name for device in devices_of(where)]
    members = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    ring = all_reduce(costs.links, members, 0.0).latency
    assert least_ring_seconds(costs)(len(members)) <= ring


def test_a_ring_over_sites_waits_for_the_slower_of_the_two_quickest_uplinks():
    """Two devices on one bus, four at a site, and six at sites whose uplinks take 1, 2 and 3 ms."""
    bus, network = Link(bandwidth=1e10, latency=1e-6), Link(bandwidth=1e9, latency=1e-4)
    uplinks = {"near": 1e-3, "far": 2e-3, "farther": 3e-3}
    nodes = tuple(
        Node(name=name, site=site, devices=("fast",) * 2, inside=bus, network=network)
        for name, site in [("a", "near"), ("b", "near"), ("c", "far"), ("d", "farther")]
    )
    where = Cluster(
        name="sites",
        types={"fast": FAST},
        nodes=nodes,
        sites=tuple(
            Site(name=name, uplink=Link(bandwidth=1e9, latency=seconds))
            for name, seconds in uplinks.items()
        ),
    )
    costs = costs_of(model([1.0]), where, job())
    for members, step in ((2, 1e-6), (4, 1e-4), (6, 1e-4 + 2e-3)):
        names = [device.name for device in devices_of(where)][:members]
        found = least_ring_seconds(costs)(members)
        assert found == pytest.approx(2 * (members - 1) * step)
        assert found <= all_reduce(costs.links, names, 0.0).latency


def measured(graph: LayerGraph, times: dict[int, float]) -> Profile:
    """Seconds of a forward by rows, and twice that backward, of layers that are all alike."""
    layers = tuple(
        LayerTime(
            device="fast",
            signature=graph.layers[0].signature,
            precision="fp32",
            tensor=1,
            rows=rows,
            forward_seconds=seconds,
            backward_seconds=2 * seconds,
        )
        for rows, seconds in times.items()
    )
    return Profile(model="chain", sequence=16, layers=layers)


def test_a_layer_is_bounded_by_the_rows_that_memory_holds_beside_it():
    """Four rows would be as quick as one. Beside the parameters of a layer, of 16 bytes each with
    Adam, there is room for two and a half."""
    parameters = 10_000_000
    saved = (usable_bytes(FAST) - 16 * parameters) / 2.5
    graph = model([10.0] * 2, parameters=parameters, saved=saved)
    profile = measured(graph, {1: 10e-3, 2: 12e-3, 4: 12e-3})
    bound = certificate(costs_of(graph, cluster(("fast",), types=(FAST,)), job(8), profile))
    assert bound.seconds == pytest.approx(8 * 2 * 3 * 12e-3 / 2, rel=1e-3)


def test_a_layer_that_no_device_holds_alone_is_bounded_by_those_that_hold_it_together():
    """Weights and gradients alone, half of the bytes with Adam, are a quarter more than it has."""
    parameters = int(2.5 * usable_bytes(FAST) / 16)
    graph, todo = model([10.0] * 2, parameters=parameters), job(8)
    bound = certificate(costs_of(graph, cluster(("fast",) * 4, types=(FAST,)), todo))
    assert bound.seconds == pytest.approx(8 * 2 * 30e9 / (4 * 20e12), rel=0.05)
    alone = certificate(costs_of(graph, cluster(*[("fast",)] * 4, types=(FAST,)), todo))
    assert alone.seconds == float("inf")


def test_what_is_said_is_how_far_the_step_may_be_from_the_best():
    prediction = Prediction(
        step_seconds=1.5, parts={}, memory=(), lower_bound_seconds=1.2, bound_reason=CHAIN
    )
    assert sentence(prediction) == f"at most 25.0% above the best possible (1.2 s: {CHAIN})"
    assert sentence(replace(prediction, lower_bound_seconds=None)) == ""
    whole = replace(prediction, bound_reason=EXHAUSTIVE)
    assert sentence(whole) == f"the best possible: {EXHAUSTIVE}"


def test_a_network_that_is_quicker_than_a_bus_is_what_the_norm_may_take():
    """Two devices of a node are 2 ms apart, and 1 us from those of other nodes."""
    slow, quick = Link(bandwidth=1e10, latency=2e-3), Link(bandwidth=1e10, latency=1e-6)
    where = cluster(*(("fast",) * 2,) * 3, inside=slow, network=quick, types=(FAST,))
    graph, todo = model([2.0] * 6, parameters=1000), job(8)
    bound = certificate(costs_of(graph, where, todo)).seconds
    assert bound <= find_plan(graph, where, todo).prediction.step_seconds


def test_the_gradients_of_weights_are_no_link_of_the_chain():
    """Six devices for two rows: only the first layer's part for weights is waited for."""
    quick = Link(bandwidth=1e12, latency=0.0)
    where = cluster(*[("fast",)] * 6, network=quick, types=(FAST, SLOW))
    graph, todo = model([10.0] * 6, parameters=1000, units=0), job(2)
    step = find_plan(graph, where, todo).prediction.step_seconds
    bound = certificate(costs_of(graph, where, todo))
    each = 10e9 / 20e12  # a forward of a row; its backward takes twice that, half of it for weights
    assert bound.reason == CHAIN
    assert bound.seconds == pytest.approx(each * (6 + 5 * SPLIT_COST + 2), rel=1e-6)
    assert bound.seconds < step < 6 * 3 * each


def test_a_backward_that_was_measured_quicker_in_two_parts_counts_as_that():
    graph, where, todo = model([10.0] * 4, parameters=1000), cluster(("fast",) * 2), job(8)
    chance = Random(0)
    layers = tuple(
        LayerTime(
            device="fast",
            signature=graph.layers[0].signature,
            precision="fp32",
            tensor=1,
            rows=rows,
            forward_seconds=1e-3 * rows,
            backward_seconds=2e-3 * rows,
            input_seconds=(0.8 + 0.1 * chance.random()) * 1e-3 * rows,
            weight_seconds=0.8e-3 * rows,
        )
        for rows in (1, 2, 4, 8)
    )
    profile = Profile(model="chain", sequence=16, layers=layers)
    bound = certificate(costs_of(graph, where, todo, profile)).seconds
    parts = Profile(
        model="chain",
        sequence=16,
        layers=tuple(
            LayerTime(
                device=each.device,
                signature=each.signature,
                precision=each.precision,
                tensor=1,
                rows=each.rows,
                forward_seconds=each.forward_seconds,
                backward_seconds=each.input_seconds + each.weight_seconds,
            )
            for each in layers
        ),
    )
    assert bound == pytest.approx(certificate(costs_of(graph, where, todo, parts)).seconds)


def test_a_certificate_that_is_left_off_gives_way_to_one_that_takes_no_time():
    costs = costs_of(model([10.0] * 4), cluster(("fast",) * 2, ("slow",) * 2), job(8))
    with pytest.raises(Stopped), stoppable(lambda: True):
        certificate(costs)
    quick = certificate_in_haste(costs)
    assert quick.reason == LAST
    assert 0 < quick.seconds < certificate(costs).seconds


def test_a_layer_that_fits_nowhere_takes_for_ever() -> None:
    """Two types share two seconds of work; of a layer that neither can hold there is no end."""
    number, never = np.array([1.0, 1.0]), float("inf")
    assert fluid_seconds(np.array([[1.0, 1.0], [1.0, 1.0]]), number) == pytest.approx(1.0)
    assert fluid_seconds(np.array([[1.0, never], [never, never]]), number) == never
    assert fluid_seconds(np.full((2, 2), never), number) == never

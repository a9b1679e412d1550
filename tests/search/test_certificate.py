"""No plan is faster than its certificate, on whatever links it runs and however its backwards are
cut in two."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, DirectLink, Islands, Link, Node, Site, devices_of
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.memory import usable_bytes
from meshwright.cost.profile import LayerTime, Profile
from meshwright.errors import FitError
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Prediction
from meshwright.search.bound_choices import Choices, choices_of, links_inside
from meshwright.search.bound_gradients import LateSeconds, node_tables, sum_seconds
from meshwright.search.bound_paths import (
    best_mixture,
    chain_seconds,
    layer_kinds,
    least_path,
    memory_mixture_seconds,
)
from meshwright.search.certificate import (
    CHAIN,
    EXHAUSTIVE,
    LAST,
    LATE,
    SUMS,
    certificate,
    certificate_in_haste,
    least_ring_seconds,
    least_step,
    sentence,
)
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan
from meshwright.stopping import Stopped, stoppable
from meshwright.techniques.backward_split.price import SPLIT_COST
from plain_constants import PLAINLY, plain
from soaks import portion
from worlds import FAST, SLOW, cluster, job, model

latencies = st.sampled_from([0.0, 1e-6, 2e-5, 3e-4, 2e-3])


links = st.builds(
    Link, bandwidth=st.sampled_from([1e9, 3e9, 1e10]), latency=latencies, shared=st.booleans()
)


@st.composite
def wired(draw) -> Cluster:
    """Nodes whose networks may be quicker than what is inside them, at one site or two, perhaps
    with islands and explicit links."""
    nodes = tuple(
        Node(
            name=f"n{i}",
            site=draw(st.sampled_from(["here", "there"])),
            devices=("fast",) * draw(st.integers(1, 4)),
            inside=draw(links),
            network=draw(links),
        )
        for i in range(draw(st.integers(1, 4)))
    )
    bridge = Link(bandwidth=draw(st.sampled_from([3e9, 3e10])), latency=draw(latencies))
    bridged = Islands(groups=((0, 1), (2, 3)), link=bridge)
    nodes = tuple(
        replace(node, islands=bridged) if len(node.devices) == 4 and draw(st.booleans()) else node
        for node in nodes
    )
    uplinks = st.none() | links
    pairs = [(a.name, b.name) for a in nodes for b in nodes if a.name < b.name]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    return Cluster(
        name="wired",
        types={"fast": FAST},
        nodes=nodes,
        sites=tuple(Site(name=name, uplink=draw(uplinks)) for name in ("here", "there")),
        direct=tuple(DirectLink(between=pair, link=draw(links)) for pair in chosen),
    )


@settings(max_examples=portion(200))
@given(wired(), st.data())
def test_no_ring_of_so_many_devices_is_quicker_than_the_least(where, data):
    costs = costs_of(model([1.0]), where, job())
    names = [device.name for device in devices_of(where)]
    members = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    ring = all_reduce(costs.links, members, 0.0).latency
    assert least_ring_seconds(costs)(len(members)) <= ring


@settings(max_examples=portion(200))
@given(wired(), st.data())
def test_no_sum_between_so_many_nodes_is_quicker_than_the_least(where, data):
    costs = costs_of(model([1.0]), where, job())
    names = [device.name for device in devices_of(where)]
    members = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    number = len({costs.devices[name].node for name in members})
    tables = node_tables(costs, ["fast"], choices_of(costs, ["fast"]))
    least = sum_seconds(1e6, np.array(number), tables.rate[number - 1])
    found = uncontended_seconds(costs.links, all_reduce(costs.links, members, 1e6))
    assert least <= found * (1 + 1e-9)


@settings(max_examples=portion(200))
@given(wired(), st.data())
def test_no_tensor_group_in_a_node_meets_quicker_than_the_least(where, data):
    costs = costs_of(model([1.0]), where, job())
    node = data.draw(st.sampled_from(where.nodes))
    names = [f"{node.name}:{i}" for i in range(len(node.devices))]
    members = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    size = data.draw(st.sampled_from([0.0, 1e3, 1e7]))
    steps = 2 * (len(members) - 1)
    ways = links_inside(costs, "fast", len(members)) if steps else [(0.0, 0.0)]
    least = min(steps * (wait + size / len(members) * slope) for wait, slope in ways)
    found = uncontended_seconds(costs.links, all_reduce(costs.links, members, size))
    assert least <= found * (1 + 1e-9)


def test_a_ring_over_sites_waits_for_the_slower_of_the_two_quickest_uplinks():
    """Two devices on one bus, four at a site, and six at sites whose uplinks take 1, 2 and 3 ms."""
    bus = Link(bandwidth=1e10, latency=1e-6, kind="measured")
    network = Link(bandwidth=1e9, latency=1e-4, kind="measured")
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
            Site(name=name, uplink=Link(bandwidth=1e9, latency=seconds, kind="measured"))
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
    bound = certificate(costs_of(graph, cluster(("fast",) * 4, types=(FAST,)), todo, PLAINLY))
    assert bound.seconds == pytest.approx(8 * 2 * 30e9 / (4 * 20e12), rel=0.05)
    single = certificate(costs_of(graph, cluster(("fast",), types=(FAST,)), todo))
    assert single.seconds == float("inf")


def test_tensor_groups_that_are_spread_over_nodes_are_not_counted():
    """Four devices in nodes of their own hold together what none of them holds alone; the search
    makes no such groups, and of those that it makes none fits."""
    graph = model([10.0], parameters=int(2.5 * usable_bytes(FAST) / 16))
    where, todo = cluster(*[("fast",)] * 4, types=(FAST,)), job(8)
    assert certificate(costs_of(graph, where, todo)).seconds == float("inf")
    with pytest.raises(FitError):
        find_plan(graph, where, todo)


HEAVY = 10_000_000
"""Parameters whose gradients, 40 MB, take 40 ms over ETHERNET."""
ROW = 30e9 / 20e12
"""Seconds of a row on a fast device in a layer of 10 GFLOP forward."""


@pytest.mark.parametrize(("rows", "seconds"), [(8, 8 * ROW), (100, 25 * ROW + 60e-3)])
def test_a_layer_takes_one_node_its_whole_work_and_several_the_sum_of_its_gradients(rows, seconds):
    """Of four devices, each a node, one works 12 ms on 8 rows. On 100 rows it would work 150 ms;
    all four take 37.5 ms, and 60 ms for the sum, which is less than two or three take."""
    graph, todo = model([10.0], parameters=HEAVY), job(rows)
    where = cluster(*[("fast",)] * 4, types=(FAST,))
    bound = certificate(costs_of(graph, where, todo, PLAINLY))
    assert bound.reason == SUMS
    assert bound.seconds == pytest.approx(seconds, rel=0.01)
    assert bound.seconds <= find_plan(graph, where, todo, PLAINLY).prediction.step_seconds


def test_a_shared_parameter_is_summed_after_all_but_gradients_of_weights():
    """The last layer is too much work for one node; a table that it shares with the first takes
    40 ms to be summed, after the forwards and the first parts of all backwards."""
    graph = model([0.01, 10.0, 10.0, 70.0], parameters=0, tied=True)
    graph = replace(graph, tied=(replace(graph.tied[0], parameters=HEAVY),))
    where, todo = cluster(*[("fast",)] * 4, types=(FAST,)), job(32)
    bound = certificate(costs_of(graph, where, todo))
    assert bound.reason == SUMS
    assert bound.seconds > 40e-3 + 32 * 90.01 * 2e9 / 20e12 / 4
    assert bound.seconds <= find_plan(graph, where, todo).prediction.step_seconds


def test_a_quicker_network_or_smaller_gradients_lower_the_bound():
    where, todo = cluster(*[("fast",)] * 4, types=(FAST,)), job(100)
    quick = cluster(*[("fast",)] * 4, network=Link(bandwidth=1e11, latency=1e-5), types=(FAST,))
    heavy, light = (model([10.0], parameters=each) for each in (HEAVY, 1000))
    seconds = certificate(costs_of(heavy, where, todo)).seconds
    assert certificate(costs_of(heavy, quick, todo)).seconds < seconds
    assert certificate(costs_of(light, where, todo)).seconds < seconds


def test_at_the_end_only_nodes_that_hold_a_layer_alone_do_not_wait():
    """Of five nodes of one device, of which two are worth twice the others, two may hold a layer
    alone: one of each kind."""
    late = LateSeconds(
        seconds=0.3,
        layers=3,
        devices=np.array([[1.0, 0.0], [0.0, 1.0]]),
        alone=np.array([1, 1]),
    )
    price = np.array([2.0, 1.0])
    assert late.idle(price, 7.0) == pytest.approx(0.3 * 4 / 7)
    assert late.idle(price, 2.0) == 0.0
    assert replace(late, layers=1).idle(price, 7.0) == pytest.approx(0.3 * 5 / 7)


def test_what_waits_for_sums_of_gradients_adds_to_the_work():
    """Twelve nodes of one device and two layers, each too much for a node: when the last of their
    backwards is done, 40 MB times 2 (m - 1) / m are still to be summed over m nodes, m >= 4."""
    where = cluster(*[("fast",)] * 12, types=(FAST,), names=[f"n{i}" for i in range(12)])
    graph, todo = model([10.0] * 2, parameters=HEAVY), job(384)
    bound = certificate(costs_of(graph, where, todo))
    work = 2 * 384 * ROW / 12
    assert bound.reason == LATE
    assert work + 40e-3 * 1.4 < bound.seconds < work + 80e-3 + 1e-3
    assert bound.seconds <= find_plan(graph, where, todo).prediction.step_seconds


@settings(max_examples=portion(50))
@given(st.floats(1.0, 2.0), st.floats(1.0, 4.0))
def test_the_least_step_is_where_a_falling_bound_meets_the_step_itself(least, top):
    """Steps that take less than x take at least top - x, or `least`: so every step takes the larger
    of `least` and top / 2."""
    found = least_step(lambda x: max(least, top - x), least)
    assert found <= max(least, top / 2) * (1 + 1e-9)
    assert found >= max(least, top / 2) * 0.99


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
    step = find_plan(graph, where, todo, PLAINLY).prediction.step_seconds
    bound = certificate(costs_of(graph, where, todo, PLAINLY))
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
    profile = plain(layers=layers)
    bound = certificate(costs_of(graph, where, todo, profile)).seconds
    parts = plain(
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


def choices(*layers: list[tuple[float, float, float]]) -> Choices:
    """Chain seconds, device-seconds and bytes of the choices of each layer, on one device type."""
    chain, work, kept = np.array(layers).transpose(2, 0, 1)
    kind = np.zeros(chain.shape[1], dtype=np.int64)
    return Choices(chain, work, kept, early=work, forward=chain, back=0 * chain, kind=kind)


def test_many_rows_make_the_chain_long_and_few_make_the_work_slow():
    """Of two layers, one row alone takes 1 s and 2 device-seconds, four together 4 s and 1
    device-second a row. Eight rows on four devices take 4 or 2 s a layer for their work; with
    weight 0.4 for the chain, both choices cost 2.8 s."""
    kinds = layer_kinds(choices(*[[(1.0, 2.0, 0.0), (4.0, 1.0, 0.0)]] * 2))
    best = best_mixture(kinds, np.array([4.0]), 8)
    assert best.seconds == pytest.approx(5.6)
    assert chain_seconds(kinds) == 2.0


def test_memory_that_holds_few_rows_on_their_way_makes_the_step_longer():
    """A row takes 1 s through each of two layers, which keep 1 byte. The first holds its byte for
    2 s, the second for 1 s: 3 byte-seconds for each of eight rows."""
    kinds = layer_kinds(choices(*[[(1.0, 1.0, 1.0)]] * 2))
    best = best_mixture(kinds, np.array([8.0]), 8)
    assert best.seconds == pytest.approx(2.0)
    rate = [(each[0], 0.0 * each[1], 8 / 2 * each[2]) for each in one_by_one(kinds)]
    assert least_path(kinds.of_layer, rate, 4.0) == pytest.approx(8 * 3 / 2)
    assert memory_mixture_seconds(kinds, best, 8, 1e9) == best.seconds
    assert memory_mixture_seconds(kinds, best, 8, 2.0) == pytest.approx(0.4 * 12 + 0.6 * 2)
    assert memory_mixture_seconds(kinds, best, 8, 0.0) == best.seconds


def one_by_one(kinds):
    return zip(kinds.choices.chain, kinds.choices.work, kinds.choices.kept, strict=True)


@settings(max_examples=portion(100))
@given(st.data())
def test_the_least_path_is_no_longer_than_the_best_of_all_paths(data):
    """Every path through up to five layers is tried, with the rest of its chain for each layer."""
    some = st.floats(0.0, 10.0)
    depth, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    costs = [
        np.array(data.draw(st.lists(st.tuples(some, some, some), min_size=width, max_size=width))).T
        for _ in range(depth)
    ]
    paths = []
    for path in product(range(width), repeat=depth):
        chain, own, rate = np.array([each[:, c] for each, c in zip(costs, path, strict=True)]).T
        rest = np.cumsum(chain[::-1])[::-1]
        paths.append(float(own.sum() + rate @ rest))
    triples = [(each[0], each[1], each[2]) for each in costs]
    longest = data.draw(st.sampled_from([1.0, 20.0, 100.0]))
    found = least_path(np.arange(depth), triples, longest)
    assert found <= min(paths) * (1 + 1e-9) + 1e-9
    if longest == 100.0 and width == 1:
        assert found == pytest.approx(min(paths))

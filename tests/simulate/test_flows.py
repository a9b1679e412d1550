"""Shares of links are max-min fair, and flows end when their bytes are through."""

from __future__ import annotations

import heapq
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.topology import Resource
from meshwright.errors import ClusterError
from meshwright.simulate.flows import (
    Flow,
    FlowNetwork,
    add_flow,
    fair_rates,
    remove_flow,
    reshare_bandwidth,
    streams_of,
)


def flow(**sizes: float) -> Flow:
    return Flow(streams=streams_of(sizes), on_end=lambda: None)


def play(network: FlowNetwork, arrivals: list[tuple[float, Flow]]) -> dict[Flow, float]:
    """When each flow ends, if each enters at its time."""
    ended: dict[Flow, float] = {}
    events = [(at, n, new, None) for n, (at, new) in enumerate(arrivals)]
    numbers = count(len(events))
    heapq.heapify(events)
    while events:
        now, _, each, version = heapq.heappop(events)
        if version is None:
            add_flow(network, each, now)
        elif version == each.version and each not in ended:
            ended[each] = now
            remove_flow(network, each)
        else:
            continue
        for other in reshare_bandwidth(network, now):
            heapq.heappush(events, (other.ends, next(numbers), other, other.version))
    return ended


def test_two_equal_flows_on_one_link_take_twice_as_long() -> None:
    a, b = flow(wire=10.0), flow(wire=10.0)
    ended = play(FlowNetwork(bandwidth={"wire": 5.0}), [(0.0, a), (0.0, b)])
    assert ended == {a: pytest.approx(4.0), b: pytest.approx(4.0)}


def test_a_flow_speeds_up_when_its_neighbour_ends() -> None:
    """10 and 30 bytes at 5 B/s: shared until 4 s, then 20 bytes alone."""
    a, b = flow(wire=10.0), flow(wire=30.0)
    ended = play(FlowNetwork(bandwidth={"wire": 5.0}), [(0.0, a), (0.0, b)])
    assert ended == {a: pytest.approx(4.0), b: pytest.approx(8.0)}


def test_a_late_flow_slows_one_down_only_while_both_last() -> None:
    a, b = flow(wire=20.0), flow(wire=5.0)
    ended = play(FlowNetwork(bandwidth={"wire": 10.0}), [(0.0, a), (1.0, b)])
    assert ended == {a: pytest.approx(2.5), b: pytest.approx(2.0)}


def test_what_one_flow_cannot_use_goes_to_the_others() -> None:
    """One flow is held to 1 B/s elsewhere; its neighbour gets the other 9."""
    slow, fast = flow(wide=10.0, narrow=10.0), flow(wide=10.0)
    rates = fair_rates({"wide": 10.0, "narrow": 1.0}, [slow, fast])
    assert rates[slow] * 10.0 == pytest.approx(1.0)
    assert rates[fast] * 10.0 == pytest.approx(9.0)


def test_a_ring_over_a_bus_counts_as_its_streams() -> None:
    """Three hops of a ring on one bus, against one transfer: each stream gets a quarter."""
    ring, single = flow(bus=30.0, port=10.0), flow(bus=10.0)
    rates = fair_rates({"bus": 4.0, "port": 100.0}, [ring, single])
    assert rates[ring] * 10.0 == pytest.approx(1.0)
    assert rates[single] * 10.0 == pytest.approx(1.0)


senders = count()


def queued(sender: str = "", **sizes: float) -> Flow:
    """From a sender of its own, unless that is given."""
    name = sender or f"sender {next(senders)}"
    return Flow(streams=streams_of(sizes), on_end=lambda: None, sender=name)


def test_messages_of_one_sender_do_not_wait_for_each_other() -> None:
    a, b, c = queued("x", wire=10.0), queued("x", wire=10.0), queued("y", wire=10.0)
    ended = play(FlowNetwork(bandwidth={"wire": 5.0}), [(0.0, a), (0.0, b), (0.0, c)])
    assert ended == {a: pytest.approx(4.0), b: pytest.approx(4.0), c: pytest.approx(6.0)}


def test_messages_that_queue_pass_one_after_another() -> None:
    a, b = queued(wire=10.0), queued(wire=10.0)
    ended = play(FlowNetwork(bandwidth={"wire": 5.0}), [(0.0, a), (0.5, b)])
    assert ended == {a: pytest.approx(2.0), b: pytest.approx(4.0)}


def test_one_that_is_held_up_elsewhere_leaves_the_rest_to_the_next() -> None:
    """The first gets 1 B/s at its narrow end, the second the other 4 until both have ended."""
    a, b = queued(wire=10.0, narrow=10.0), queued(wire=8.0)
    ended = play(FlowNetwork(bandwidth={"wire": 5.0, "narrow": 1.0}), [(0.0, a), (0.0, b)])
    assert ended == {a: pytest.approx(10.0), b: pytest.approx(2.0)}


def test_the_first_in_the_queue_shares_with_a_collective() -> None:
    ring, a, b = flow(wire=8.0), queued(wire=4.0), queued(wire=4.0)
    ended = play(FlowNetwork(bandwidth={"wire": 4.0}), [(0.0, ring), (0.0, a), (0.0, b)])
    assert ended == {a: pytest.approx(2.0), ring: pytest.approx(4.0), b: pytest.approx(4.0)}


def test_a_dead_link_is_named() -> None:
    wire = Resource("here", "link", "out", "there")
    with pytest.raises(ClusterError, match="link of here"):
        fair_rates({wire: 0.0}, [Flow(streams=streams_of({wire: 1.0}), on_end=lambda: None)])


sizes = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10.0), min_size=1)
speeds = st.fixed_dictionaries({name: st.floats(0.1, 10.0) for name in "abcd"})


@given(st.lists(sizes, min_size=1, max_size=6), speeds)
def test_no_resource_is_overfull_and_every_flow_has_a_full_one(
    demands: list[dict[str, float]], bandwidth: dict[str, float]
) -> None:
    """The two conditions that make an allocation max-min fair: feasible, and each flow has a
    bottleneck on which no stream is faster."""
    flows = [flow(**demand) for demand in demands]
    rates = fair_rates(bandwidth, flows)
    used = {
        name: sum(rates[f] * f.streams.bytes_by_resource.get(name, 0.0) for f in flows)
        for name in "abcd"
    }
    assert all(used[name] <= bandwidth[name] * (1 + 1e-9) for name in used)
    for f in flows:
        own = rates[f] * f.streams.bytes_each
        assert any(
            used[name] >= bandwidth[name] * (1 - 1e-9)
            and all(
                own >= rates[g] * g.streams.bytes_each * (1 - 1e-9)
                for g in flows
                if name in g.streams.bytes_by_resource
            )
            for name in f.streams.bytes_by_resource
        )


@given(st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6), speeds)
def test_queues_leave_no_link_idle_that_somebody_could_use(
    demands: list[tuple[dict[str, float], bool]], bandwidth: dict[str, float]
) -> None:
    flows = [queued(**demand) if waits else flow(**demand) for demand, waits in demands]
    rates = fair_rates(bandwidth, flows)
    used = {
        name: sum(rates[f] * f.streams.bytes_by_resource.get(name, 0.0) for f in flows)
        for name in "abcd"
    }
    assert all(used[name] <= bandwidth[name] * (1 + 1e-9) for name in used)
    full = {name for name in used if used[name] >= bandwidth[name] * (1 - 1e-9)}
    assert all(full & set(f.streams.bytes_by_resource) for f in flows)


@given(st.lists(st.tuples(st.floats(0.0, 5.0), sizes), min_size=1, max_size=6), speeds)
def test_updating_neighbours_only_ends_flows_when_updating_all_would(
    arrivals: list[tuple[float, dict[str, float]]], bandwidth: dict[str, float]
) -> None:
    """A reference that recomputes every rate at every event gives the same ends."""
    flows = [(at, flow(**demand)) for at, demand in arrivals]
    ended = play(FlowNetwork(bandwidth=bandwidth), flows)
    waiting, left, expected, now = sorted(flows, key=lambda f: f[0]), {}, {}, 0.0
    while waiting or left:
        rates = fair_rates(bandwidth, left)
        horizon = waiting[0][0] if waiting else float("inf")
        nearest = min((now + left[f] / rates[f] for f in left), default=float("inf"))
        step = min(horizon, nearest)
        for f in left:
            left[f] -= rates[f] * (step - now)
        now = step
        if step == horizon and waiting:
            left[waiting.pop(0)[1]] = 1.0
        for f in [f for f in left if left[f] <= 1e-9]:
            expected[f] = now
            del left[f]
    assert ended.keys() == expected.keys()
    for f, end in ended.items():
        assert end == pytest.approx(expected[f], rel=1e-6, abs=1e-6)

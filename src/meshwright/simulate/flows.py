"""Shares the bandwidth of resources among flows.

Sharing is max-min fair. With gloo, messages of several senders over one resource queue instead: the
first sender gets the share of all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from meshwright.cluster.topology import Resource
from meshwright.errors import ClusterError, Problem

Weights = tuple[tuple[Resource, float], ...]
"""The number of streams on every resource."""


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """Describes the equal streams that a flow is made of; bandwidth is shared fairly among them."""

    bytes_by_resource: Mapping[Resource, float]
    """The bytes of all streams together on every resource, all positive."""
    bytes_each: float
    """The bytes of one stream."""
    weights: Weights


def streams_of(sizes: Mapping[Resource, float], bytes_each: float | None = None) -> Streams:
    """Divides the bytes on every resource, all positive, into streams of `bytes_each`: by default
    the least of them."""
    each = bytes_each or min(sizes.values())
    return Streams(sizes, each, tuple((resource, size / each) for resource, size in sizes.items()))


@dataclass(slots=True, eq=False)
class Flow:
    """Describes a transfer or collective on its way, which uses all its resources at one common
    rate."""

    streams: Streams
    on_end: Callable[[], None]
    """The reaction to its end."""
    sender: str | None = None
    """The sending device, if its messages queue: the flow waits for flows of other senders that
    came before it on any of its resources."""
    number: int = 0
    """Its number in the order of arrival."""
    remaining: float = 1.0
    """The share of its bytes that is still to move."""
    rate: float = 0.0
    """The share of its bytes that moves in one second."""
    since: float = 0.0
    """The moment to which `remaining` belongs."""
    version: int = 0
    """A number that grows with every change of `rate`, which invalidates earlier forecasts of its
    end."""

    @property
    def ends(self) -> float:
        """Returns the moment at which the flow ends if its rate stays the same."""
        return self.since + self.remaining / self.rate if self.rate else inf


@dataclass(slots=True, eq=False)
class FlowNetwork:
    """Holds the resources and the flows on them."""

    bandwidth: Mapping[Resource, float]
    """The bytes per second of every resource."""
    flows: dict[Resource, dict[Flow, None]] = field(default_factory=dict)
    """The flows on every resource, in the order of arrival."""
    touched: dict[Flow, None] = field(default_factory=dict)
    """The flows whose share of some resource may have changed."""
    arrived: int = 0
    """The number of flows that have arrived so far."""
    passing: dict[Streams, tuple[dict[Flow, None], ...]] = field(default_factory=dict)
    """The flows on each resource of some streams, as in `flows`."""
    alone: dict[Streams, tuple[float, Resource]] = field(default_factory=dict)
    """The speed of each of some streams where nothing else passes, and what limits it."""


def add_flow(network: FlowNetwork, flow: Flow, now: float) -> None:
    """Adds a flow to the network; `reshare_bandwidth` gives it its rate."""
    passing = network.passing.get(flow.streams)
    if passing is None:
        every = (network.flows.setdefault(name, {}) for name in flow.streams.bytes_by_resource)
        passing = network.passing[flow.streams] = tuple(every)
    for others in passing:
        others[flow] = None
    network.arrived += 1
    flow.since, flow.number = now, network.arrived
    network.touched[flow] = None


def remove_flow(network: FlowNetwork, flow: Flow) -> None:
    """Removes a flow from the network; `reshare_bandwidth` gives its share to the others."""
    network.touched.pop(flow, None)
    for others in network.passing[flow.streams]:
        del others[flow]
        if others:
            network.touched.update(others)


def reshare_bandwidth(network: FlowNetwork, now: float) -> list[Flow]:
    """Shares bandwidth again after all arrivals and departures of one moment.

    Returns every flow whose end has changed.
    """
    touched, network.touched = network.touched, {}
    for flow in touched:
        if not _is_alone(network, flow):
            rates = fair_rates(network.bandwidth, _sharing(network, touched))
            break
    else:
        rates = _rates_alone(network, touched)
    changed = []
    for flow, rate in rates.items():
        if rate != flow.rate:
            flow.remaining = max(flow.remaining - flow.rate * (now - flow.since), 0.0)
            flow.since, flow.rate = now, rate
            flow.version += 1
            changed.append(flow)
    return changed


def _is_alone(network: FlowNetwork, flow: Flow) -> bool:
    """Returns True if no other flow passes any resource of this one."""
    for others in network.passing[flow.streams]:  # noqa: SIM110 - `all` is slower
        if len(others) > 1:
            return False
    return True


def _sharing(network: FlowNetwork, flows: Iterable[Flow]) -> list[Flow]:
    """Returns these flows and every flow that shares a resource with them, directly or through
    others."""
    found = dict.fromkeys(flows)
    queue, seen = list(found), set[Resource]()
    while queue:
        for resource in queue.pop().streams.bytes_by_resource:
            if resource not in seen:
                seen.add(resource)
                new = [flow for flow in network.flows[resource] if flow not in found]
                found.update(dict.fromkeys(new))
                queue.extend(new)
    return list(found)


def fair_rates(bandwidth: Mapping[Resource, float], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Returns the rate of each flow, in shares of its bytes per second; streams share max-min
    fairly.

    Queued flows that are first on all their resources share with the others that do not queue. The
    remaining queued flows get, in the order of arrival, what is left. Raises ClusterError for a
    resource without bandwidth.
    """
    every = dict.fromkeys(flows)
    left = {resource: bandwidth[resource] for flow in every for resource, _ in flow.streams.weights}
    _check_bandwidth(left)
    waiting = _not_first(every)
    rates = _filled(left, [flow for flow in every if flow not in waiting])
    for flow in waiting:
        speed = min(left[resource] / weight for resource, weight in flow.streams.weights)
        rates[flow] = speed / flow.streams.bytes_each
        for resource, weight in flow.streams.weights:
            left[resource] = max(left[resource] - speed * weight, 0.0)
    return rates


def _rates_alone(network: FlowNetwork, flows: Collection[Flow]) -> dict[Flow, float]:
    """Returns the same as `fair_rates`, for flows that share no resource with another, in the same
    order: the slowest first."""
    alone = network.alone
    for flow in flows:
        if flow.streams not in alone:
            alone[flow.streams] = _speed_alone(network.bandwidth, flow.streams)
    if len(flows) > 1:
        flows = sorted(flows, key=lambda flow: alone[flow.streams])
    return {flow: alone[flow.streams][0] / flow.streams.bytes_each for flow in flows}


def _speed_alone(bandwidth: Mapping[Resource, float], streams: Streams) -> tuple[float, Resource]:
    _check_bandwidth({resource: bandwidth[resource] for resource, _ in streams.weights})
    return min((bandwidth[resource] / w, resource) for resource, w in streams.weights)


def _check_bandwidth(bandwidth: Mapping[Resource, float]) -> None:
    """Raises ClusterError for a resource without bandwidth."""
    if min(bandwidth.values(), default=1.0) <= 0:
        empty = [resource for resource, speed in bandwidth.items() if speed <= 0]
        ClusterError.check(
            Problem(f"{kind} of {owner}", "bandwidth", "0", "above zero", each=("link", owner))
            for owner, kind, _, _ in empty
        )


def _not_first(flows: Iterable[Flow]) -> dict[Flow, None]:
    """Returns the queued flows that follow a flow of another sender on some resource, in order of
    arrival."""
    waiting: dict[Flow, None] = {}
    first: dict[Resource, str] = {}
    for flow in sorted((flow for flow in flows if flow.sender), key=lambda flow: flow.number):
        assert flow.sender is not None
        served = [first.setdefault(name, flow.sender) for name in flow.streams.bytes_by_resource]
        if any(sender != flow.sender for sender in served):
            waiting[flow] = None
    return waiting


def _filled(left: dict[Resource, float], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Shares bandwidth by progressive filling, and subtracts the shares from `left`.

    All streams speed up together; those through the first resource to fill keep that speed, the
    others go on (Bertsekas and Gallager, Data Networks, section 6.5.2). Flows with equal streams on
    the same resources, such as the buckets of one ring, are treated as one.
    """
    alike: dict[Weights, list[Flow]] = {}
    for flow in flows:
        alike.setdefault(flow.streams.weights, []).append(flow)
    rates: dict[Flow, float] = {}
    while alike:
        load: dict[Resource, float] = defaultdict(float)
        for weights, members in alike.items():
            for resource, weight in weights:
                load[resource] += weight * len(members)
        speed, fullest = min((left[r] / load[r], r) for r in load)
        passing = [w for w, (one, *_) in alike.items() if fullest in one.streams.bytes_by_resource]
        for weights in passing:
            members = alike.pop(weights)
            rates.update((flow, speed / flow.streams.bytes_each) for flow in members)
            for resource, weight in weights:
                left[resource] = max(left[resource] - speed * weight * len(members), 0.0)
    return rates

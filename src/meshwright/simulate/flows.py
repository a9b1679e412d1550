"""Flows that share resources: every stream of bytes gets its max-min fair share, but for messages
that queue: of the senders on one resource the first gets what all of them would."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from meshwright.cluster.topology import Resource
from meshwright.errors import ClusterError, Problem


@dataclass(slots=True, eq=False)
class Flow:
    """A transfer or collective on its way. It uses all its resources at one common pace."""

    bytes_by_resource: Mapping[Resource, float]
    """Positive amounts only."""
    then: Callable[[], None]
    """What follows its end."""
    stream: float = 0.0
    """Bytes of one of the equal streams the flow is made of: what fairness is measured in. 0: the
    least of its bytes."""
    sender: str | None = None
    """If known: waits for those of other senders that came before it on any of its resources."""
    number: int = 0
    """In the order of arrival."""
    left: float = 1.0
    """Share of the bytes still to move."""
    rate: float = 0.0
    """Shares per second."""
    since: float = 0.0
    """When `left` was true."""
    version: int = 0
    """Changes whenever the rate does, which dates older forecasts."""
    weights: tuple[tuple[Resource, float], ...] = ()
    """Streams on every resource."""

    def __post_init__(self) -> None:
        self.stream = self.stream or min(self.bytes_by_resource.values())
        self.weights = tuple((r, size / self.stream) for r, size in self.bytes_by_resource.items())

    @property
    def ends(self) -> float:
        """Seconds at which the flow is over if its rate stays."""
        return self.since + self.left / self.rate if self.rate else inf


@dataclass(slots=True, eq=False)
class Network:
    """Resources, and the flows on them."""

    bandwidth: Mapping[Resource, float]
    """Bytes per second of every resource."""
    flows: dict[Resource, dict[Flow, None]] = field(default_factory=dict)
    """By resource, in order of arrival."""
    touched: dict[Flow, None] = field(default_factory=dict)
    """Flows whose share of some resource may have changed."""
    arrived: int = 0


def start(network: Network, flow: Flow, now: float) -> None:
    """Let a flow in; `settle` gives it its rate."""
    for resource in flow.bytes_by_resource:
        network.flows.setdefault(resource, {})[flow] = None
    network.arrived += 1
    flow.since, flow.number = now, network.arrived
    network.touched[flow] = None


def finish(network: Network, flow: Flow) -> None:
    """Take a flow out; `settle` gives the others what it leaves."""
    network.touched.pop(flow, None)
    for resource in flow.bytes_by_resource:
        others = network.flows[resource]
        del others[flow]
        network.touched.update(others)


def settle(network: Network, now: float) -> list[Flow]:
    """Share anew where flows have come or gone, once for all that did at this moment. Returns every
    flow whose end has changed."""
    affected = _sharing(network, network.touched)
    network.touched.clear()
    return _share(network, affected, now) if affected else []


def _sharing(network: Network, flows: Iterable[Flow]) -> list[Flow]:
    """These flows, and all that share a resource with them directly or through others."""
    found = dict.fromkeys(flows)
    queue, seen = list(found), set[Resource]()
    while queue:
        for resource in queue.pop().bytes_by_resource:
            if resource not in seen:
                seen.add(resource)
                new = [flow for flow in network.flows[resource] if flow not in found]
                found.update(dict.fromkeys(new))
                queue.extend(new)
    return list(found)


def _share(network: Network, flows: list[Flow], now: float) -> list[Flow]:
    """Give these flows their fair rates; those whose rate has changed."""
    changed = []
    for flow, rate in fair_rates(network.bandwidth, flows).items():
        if rate != flow.rate:
            flow.left = max(flow.left - flow.rate * (now - flow.since), 0.0)
            flow.since, flow.rate = now, rate
            flow.version += 1
            changed.append(flow)
    return changed


def fair_rates(bandwidth: Mapping[Resource, float], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Shares per second of each flow, max-min fair between streams.

    Queued flows: those first in line on all their resources share with the rest; the others get, in
    the order of arrival, what is left. Raises ClusterError for a resource without bandwidth.
    """
    every = dict.fromkeys(flows)
    left = {resource: bandwidth[resource] for flow in every for resource in flow.bytes_by_resource}
    empty = [resource for resource, speed in left.items() if speed <= 0]
    ClusterError.check(
        Problem(f"link {resource}", "bandwidth", "0", "above zero", each=("link", str(resource)))
        for resource in empty
    )
    if len(every) == 1:
        (flow,) = every
        return {
            flow: min(left[resource] / weight for resource, weight in flow.weights) / flow.stream
        }
    waiting = _not_first(every)
    rates = _filled(left, [flow for flow in every if flow not in waiting])
    for flow in waiting:
        speed = min(left[resource] / weight for resource, weight in flow.weights)
        rates[flow] = speed / flow.stream
        for resource, weight in flow.weights:
            left[resource] = max(left[resource] - speed * weight, 0.0)
    return rates


def _not_first(flows: Iterable[Flow]) -> dict[Flow, None]:
    """Queued flows that have one before them on some resource, in the order of arrival."""
    waiting: dict[Flow, None] = {}
    first: dict[Resource, str] = {}
    for flow in sorted((flow for flow in flows if flow.sender), key=lambda flow: flow.number):
        assert flow.sender is not None
        served = [first.setdefault(name, flow.sender) for name in flow.bytes_by_resource]
        if any(sender != flow.sender for sender in served):
            waiting[flow] = None
    return waiting


def _filled(left: dict[Resource, float], flows: Iterable[Flow]) -> dict[Flow, float]:
    """Progressive filling, which takes what it gives from `left`: all streams speed up together;
    those through the first resource to fill stay at that speed, the rest go on (Bertsekas and
    Gallager, Data Networks, section 6.5.2). Flows with equal streams on the same resources, as the
    buckets of one ring, are treated as one.
    """
    alike: dict[tuple[tuple[Resource, float], ...], list[Flow]] = {}
    for flow in flows:
        alike.setdefault(flow.weights, []).append(flow)
    rates: dict[Flow, float] = {}
    while alike:
        load: dict[Resource, float] = defaultdict(float)
        for weights, members in alike.items():
            for resource, weight in weights:
                load[resource] += weight * len(members)
        speed, fullest = min((left[r] / load[r], r) for r in load)
        passing = [w for w, (one, *_) in alike.items() if fullest in one.bytes_by_resource]
        for weights in passing:
            members = alike.pop(weights)
            rates.update((flow, speed / flow.stream) for flow in members)
            for resource, weight in weights:
                left[resource] = max(left[resource] - speed * weight * len(members), 0.0)
    return rates

"""Resharding between meshes: the nine cases of "On Optimizing the Communication of Model
Parallelism" (and its one-to-many series), simulated on the paper's cluster, and run on gloo.

    python benchmarks/resharding.py [--run] [--json OUT]

Simulated: AWS p3.8xlarge hosts, 10 Gbit/s full duplex each, four devices of 20 GB/s inside.
Send/receive and all-gather start everything at once and share links fairly, which is more than
they reach; broadcasts take the ports of hosts in the order of the plan. `bound`: no way is faster.
`--run`: the same cases scaled down, on forked gloo processes, two for each host; every element is
checked, and the bytes that each process really wrote to its sockets are compared with the plan's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

from resharding_cases import CASES, ITEM, METHODS, ONE_TO_MANY, Case, layouts
from resharding_messages import Strategy

from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Site
from meshwright.cluster.topology import Resource, Topology, path, topology
from meshwright.cost.collective import all_gather
from meshwright.layout.boxes import elements
from meshwright.layout.multicast import lower_bound
from meshwright.layout.reshard import Transfer, multicasts, reshard
from meshwright.layout.tiles import unit_tasks
from meshwright.simulate.flows import (
    Flow,
    FlowNetwork,
    add_flow,
    remove_flow,
    reshare_bandwidth,
    streams_of,
)

NETWORK = 10e9 / 8
INSIDE = 20e9
LATENCY = 50e-6
CHUNK = 4 * 2**20
"""Bytes that a chain passes on at once."""


def cluster_of(hosts: dict[int, str]) -> tuple[Topology, dict[int, str]]:
    """The paper's hosts, and the device of every rank."""
    count = Counter(hosts.values())
    kind = DeviceType(name="V100", memory=16 << 30, memory_bandwidth=9e11, peak={"fp32": 15e12})
    nodes = tuple(
        Node(
            name=host,
            site="aws",
            devices=("V100",) * size,
            inside=Link(bandwidth=INSIDE, latency=5e-6),
            network=Link(bandwidth=NETWORK, latency=LATENCY),
        )
        for host, size in count.items()
    )
    cluster = Cluster(
        name="p3.8xlarge", types={"V100": kind}, nodes=nodes, sites=(Site(name="aws"),)
    )
    seen: Counter[str] = Counter()
    devices = {}
    for rank, host in hosts.items():
        devices[rank] = f"{host}:{seen[host]}"
        seen[host] += 1
    return topology(cluster), devices


@dataclass
class Play:
    """Transfers on links that they share."""

    links: Topology
    devices: dict[int, str]
    hosts: dict[int, str]
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: int = 0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.network = FlowNetwork(bandwidth=self.links.capacities)

    def at(self, seconds: float, react: Callable[[], None]) -> None:
        """Later."""
        self.count += 1
        heappush(self.events, (seconds, self.count, react))

    def flow(
        self, carried: dict[Resource, float], latency: float, then: Callable[[], None]
    ) -> None:
        """Bytes on resources at one pace, after a latency."""
        flow = Flow(streams_of(carried), on_end=then)
        self.at(self.now + latency, lambda: add_flow(self.network, flow, self.now))

    def leave(self, flow: Flow, version: int) -> None:
        """A flow's forecast end."""
        if version == flow.version:
            remove_flow(self.network, flow)
            self.ended = self.now
            flow.on_end()

    def run(self) -> float:
        """Seconds until the last flow has ended."""
        while self.events:
            self.now, _, react = heappop(self.events)
            react()
            if self.network.touched and (not self.events or self.events[0][0] > self.now):
                for flow in reshare_bandwidth(self.network, self.now):
                    self.at(max(flow.ends, self.now), partial(self.leave, flow, flow.version))
        return self.ended

    def hop(self, source: int, target: int, size: float, then: Callable[[], None]) -> None:
        """One message."""
        way = path(self.links, self.devices[source], self.devices[target])
        self.flow(dict.fromkeys(way.resources, size), way.latency, then)

    def begin(
        self, transfer: Transfer, strategy: Strategy | None, done: Callable[[], None]
    ) -> None:
        """A whole transfer."""
        size = float(elements(transfer.box) * ITEM)
        if strategy in (None, "broadcast") or len(transfer.receivers) == 1:
            self.chain(transfer, size, done)
            return
        groups: dict[str, list[int]] = defaultdict(list)
        for rank in transfer.receivers:
            groups[self.hosts[rank]].append(rank)
        for ranks in groups.values():
            share = size / len(ranks) if strategy == "gather" else size
            left = [len(ranks)]

            def arrived(left: list[int] = left, ranks: list[int] = ranks) -> None:
                left[0] -= 1
                if not left[0] and strategy == "gather" and len(ranks) > 1:
                    ring = all_gather(self.links, [self.devices[r] for r in ranks], size)
                    self.flow(ring.bytes_by_resource, ring.latency, lambda: None)

            for rank in ranks:
                self.hop(transfer.source, rank, share, arrived)

    def chain(self, transfer: Transfer, size: float, done: Callable[[], None]) -> None:
        """All hops at the pace of the slowest, after the first chunk has come through."""
        carried: dict[Resource, float] = defaultdict(float)
        fill = []
        for source, target in pairwise((transfer.source, *transfer.receivers)):
            way = path(self.links, self.devices[source], self.devices[target])
            for resource in way.resources:
                carried[resource] += size
            slowest = min(self.links.capacities[resource] for resource in way.resources)
            fill.append(way.latency + min(CHUNK, size) / slowest)
        self.flow(dict(carried), sum(fill) - max(fill), done)


def seconds(case: Case, method: str) -> float:
    """Simulated seconds of one case."""
    source, target, hosts = layouts(case)
    strategy, order = METHODS[method]
    play = Play(*cluster_of(hosts), hosts)
    transfers = reshard(source, target, hosts, order)
    if strategy in ("send", "gather"):
        for transfer in transfers:
            play.begin(transfer, strategy, lambda: None)
        return play.run()
    queues: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    ports = [list(used(transfer, hosts)) for transfer in transfers]
    for index, each in enumerate(ports):
        for port in each:
            queues[port].append(index)
    begun: set[int] = set()

    def advance() -> None:
        for index, transfer in enumerate(transfers):
            if index not in begun and all(queues[port][0] == index for port in ports[index]):
                begun.add(index)
                play.begin(transfer, strategy, partial(over, index))

    def over(index: int) -> None:
        for port in ports[index]:
            queues[port].popleft()
        advance()

    advance()
    return play.run()


def used(transfer: Transfer, hosts: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Halves of interfaces, as in layout.order."""
    chain = list(dict.fromkeys(hosts[rank] for rank in (transfer.source, *transfer.receivers)))
    for here, there in pairwise(chain):
        yield "out", here
        yield "in", there


def bound_seconds(case: Case) -> float:
    """No way is faster: what the interfaces must carry, at their speed; inside one host what a
    device must receive."""
    source, target, hosts = layouts(case)
    works = multicasts(unit_tasks(source, target), hosts)
    return lower_bound(works) * ITEM / NETWORK


def simulate() -> dict[str, dict[str, float]]:
    """Every case by every method, in seconds, printed as a table."""
    found: dict[str, dict[str, float]] = {}
    print(f"{'case':10}{'tasks':>7}" + "".join(f"{m:>14}" for m in METHODS), end="")
    print(f"{'bound':>9}{'ordered / bound':>17}")
    for case in (*CASES, *ONE_TO_MANY):
        source, target, _ = layouts(case)
        row = {method: seconds(case, method) for method in METHODS}
        row["bound"] = bound_seconds(case)
        found[case.name] = row
        print(f"{case.name:10}{len(unit_tasks(source, target)):7}", end="")
        print("".join(f"{row[m]:14.3f}" for m in METHODS), end="")
        print(f"{row['bound']:9.3f}{row['ordered'] / row['bound']:17.3f}")
    return found


def main() -> None:
    """Simulate, and run if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {"simulated": simulate()}
    if options.run:
        from resharding_run import run

        print()
        found["run"] = run()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

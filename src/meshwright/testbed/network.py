"""Writes the commands that make the network of a testbed, and take it away.

Every node gets a namespace. One more (`hub`) holds a bridge for every site that has an uplink, and
one for the core. Each link is a pair of veth ends: what leaves a node is shaped at its own end,
what reaches it at the bridge's end. Nothing appears outside these namespaces.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from meshwright.cluster.spec import Cluster, Link
from meshwright.records import record
from meshwright.testbed.capabilities import Capabilities
from meshwright.testbed.spec import Testbed
from meshwright.units import format_bandwidth

Command = tuple[str, ...]
"""A command and its arguments."""

FASTEST = 1e9
"""Bytes per second above which a link is left as fast as the machine makes it: shaping costs CPU
time for every packet, and a loopback gives several processes no more than this anyway."""
MTU = 1500
"""Bytes of the largest packet on a network, and on a loopback."""
LOOPBACK_MTU = 65536
BURST_SECONDS = 1e-3
"""Bytes that a shaped link lets through at once, as seconds at its rate."""
QUEUE_SECONDS = 0.1
"""Length of a shaped link's queue, as seconds at its rate."""
SMALL_SHARE = 0.05
"""Share of a link's rate that is reserved for small packets; they may borrow the rest."""


@record
class Wiring:
    """Describes one network: its namespaces and addresses, and the commands that make it."""

    namespaces: tuple[str, ...]
    by_node: dict[str, str]
    """Namespace of every node, by name."""
    addresses: dict[str, str]
    """IP address of every node, by name."""
    up: tuple[Command, ...]
    """Commands that make the network."""
    down: tuple[Command, ...]
    """Commands that take it away."""
    absent: tuple[str, ...]
    """Ways in which the network is not as the cluster says, with the reasons."""


def wiring(testbed: Testbed, capabilities: Capabilities, identity: str) -> Wiring:
    """Designs the network of a testbed, whose names all begin with `identity`."""
    cluster, hub = testbed.cluster, f"{identity}-hub"
    by_node = {node.name: f"{identity}-n{i}" for i, node in enumerate(cluster.nodes)}
    addresses = {
        node.name: f"10.77.{i // 250}.{i % 250 + 1}" for i, node in enumerate(cluster.nodes)
    }
    namespaces = (hub, *by_node.values())
    shaper = _Shaper(testbed, capabilities)
    running = [
        *(("ip", "netns", "add", name) for name in namespaces),
        *_bridges(cluster, hub, shaper),
        *_nodes(cluster, hub, by_node, addresses, shaper),
        *_direct(cluster, by_node, addresses, shaper),
    ]
    down = tuple(("ip", "netns", "delete", name) for name in namespaces)
    return Wiring(
        namespaces=namespaces,
        by_node=by_node,
        addresses=addresses,
        up=tuple(running),
        down=down,
        absent=tuple(shaper.absent()),
    )


class _Shaper:
    """Turns links into commands, and notes what this machine cannot do."""

    def __init__(self, testbed: Testbed, capabilities: Capabilities) -> None:
        self.bed, self.able = testbed, capabilities
        self.unshaped: dict[str, str] = {}
        """Reasons why links are not slowed down, by link."""
        self.late = False
        """True if a link has a latency that cannot be made."""

    def shape(self, namespace: str, port: str, link: Link, what: str, mtu: int) -> list[Command]:
        """Returns the commands that make a port send no faster than a link, and delay packets by
        half its latency; the port at the other end adds the other half."""
        if link.latency > 0 and not self.able.latency:
            self.late = True
        if link.bandwidth > FASTEST:
            limit = format_bandwidth(FASTEST)
            self.unshaped[what] = f"{format_bandwidth(link.bandwidth)} is above {limit}"
            return []
        if self.able.shaper is None:
            return []
        tc = ("tc", "-n", namespace)
        rate, burst = f"{round(link.bandwidth * 8)}bit", self._burst(link, mtu)
        queue = max(round(link.bandwidth * QUEUE_SECONDS), 4 * burst)
        gso = ("ip", "-n", namespace, "link", "set", port, "gso_max_size", str(min(burst, 65536)))
        if self.able.shaper == "tbf":
            tbf = f"root tbf rate {rate} burst {burst} limit {queue}".split()
            return [gso, (*tc, "qdisc", "add", "dev", port, *tbf)]
        return [gso, *self._htb(tc, port, link, rate, burst, queue)]

    def _burst(self, link: Link, mtu: int) -> int:
        return max(round(link.bandwidth * BURST_SECONDS), 2 * mtu)

    def _htb(
        self, tc: Command, port: str, link: Link, rate: str, burst: int, queue: int
    ) -> Iterator[Command]:
        small = round(link.bandwidth * 8 * SMALL_SHARE)
        bulk = round(link.bandwidth * 8) - small
        lent = f"ceil {rate} burst {burst} cburst {burst} quantum 3000"
        yield (*tc, *f"qdisc add dev {port} root handle 1: htb default 2".split())
        whole = f"classid 1:1 htb rate {rate} {lent}"
        yield (*tc, *f"class add dev {port} parent 1: {whole}".split())
        for number, share, prio in ((2, bulk, 1), (3, small, 0)):
            own = f"classid 1:{number} htb rate {share}bit {lent} prio {prio}"
            yield (*tc, *f"class add dev {port} parent 1:1 {own}".split())
        if self.able.latency and link.latency > 0:
            delay = f"netem delay {link.latency / 2 * 1e6:.0f}us limit {max(100, queue // 100)}"
            for number in (2, 3):
                yield (*tc, *f"qdisc add dev {port} parent 1:{number} {delay}".split())
        else:
            yield (*tc, *f"qdisc add dev {port} parent 1:2 bfifo limit {queue}".split())
        if self.bed.small_first and self.able.priority:
            below_256 = "match u16 0x0000 0xff00 at 2 flowid 1:3"
            yield (*tc, *f"filter add dev {port} parent 1: protocol ip prio 1 u32".split(),
                   *below_256.split())  # fmt: skip

    def absent(self) -> Iterator[str]:
        """Yields what could not be done, with the reasons."""
        for what, why in self.unshaped.items():
            yield f"rate of {what}: as fast as this machine is ({why})"
        missing = self.able.missing
        if "link rates" in missing:
            yield f"link rates ({missing['link rates']})"
        if self.late:
            yield f"link latencies ({missing['link latency']})"
        if self.bed.small_first and "small packets first" in missing:
            yield f"small packets first ({missing['small packets first']})"


def _ip(namespace: str, text: str) -> Command:
    return ("ip", "-n", namespace, *text.split())


def _bridges(cluster: Cluster, hub: str, shaper: _Shaper) -> Iterator[Command]:
    yield _ip(hub, "link add name core type bridge")
    yield _ip(hub, "link set core up")
    for i, site in enumerate(cluster.sites):
        if site.uplink is None:
            continue
        yield _ip(hub, f"link add name site{i} type bridge")
        yield _ip(hub, f"link add name out{i} type veth peer name in{i}")
        # What goes over `out` leaves the site, what goes over `in` comes to it.
        for port, bridge in ((f"out{i}", f"site{i}"), (f"in{i}", "core")):
            yield _ip(hub, f"link set {port} master {bridge}")
            yield _ip(hub, f"link set {port} up")
            yield from shaper.shape(hub, port, site.uplink, f"the uplink of {site.name}", MTU)
        yield _ip(hub, f"link set site{i} up")


def _nodes(
    cluster: Cluster,
    hub: str,
    by_node: dict[str, str],
    addresses: dict[str, str],
    shaper: _Shaper,
) -> Iterator[Command]:
    bridges = {s.name: f"site{i}" if s.uplink else "core" for i, s in enumerate(cluster.sites)}
    for i, node in enumerate(cluster.nodes):
        own = by_node[node.name]
        yield (*_ip(hub, f"link add name port{i} type veth peer name eth0 netns {own}"),)
        yield _ip(hub, f"link set port{i} master {bridges[node.site]}")
        yield _ip(hub, f"link set port{i} up")
        for setting in (
            "net.ipv6.conf.all.disable_ipv6=1",
            "net.ipv4.tcp_slow_start_after_idle=0",
        ):
            yield ("ip", "netns", "exec", own, "sysctl", "-q", "-w", setting)
        yield _ip(own, f"address add {addresses[node.name]}/16 dev eth0")
        yield _ip(own, "link set eth0 up")
        yield _ip(own, "link set lo up")
        if shaper.able.cubic:
            source = f"src {addresses[node.name]}"
            yield _ip(own, f"route replace 10.77.0.0/16 dev eth0 {source} congctl cubic")
        network = f"the network of {node.name}"
        yield from shaper.shape(own, "eth0", node.network, network, MTU)
        yield from shaper.shape(hub, f"port{i}", node.network, network, MTU)
        if len(node.devices) > 1:
            inside = f"the links inside {node.name}"
            yield from shaper.shape(own, "lo", node.inside, inside, LOOPBACK_MTU)


def _direct(
    cluster: Cluster, by_node: dict[str, str], addresses: dict[str, str], shaper: _Shaper
) -> Iterator[Command]:
    for i, each in enumerate(cluster.direct):
        one, other = each.between
        port, what = f"direct{i}", f"the link between {one} and {other}"
        ends = f"type veth peer name {port} netns {by_node[other]}"
        yield _ip(by_node[one], f"link add name {port} {ends}")
        for here, there in ((one, other), (other, one)):
            own = by_node[here]
            yield _ip(own, f"link set {port} up")
            route = f"route add {addresses[there]}/32 dev {port} src {addresses[here]}"
            yield _ip(own, f"{route} congctl cubic" if shaper.able.cubic else route)
            yield from shaper.shape(own, port, each.link, what, MTU)


def as_text(command: Command) -> str:
    """Returns a command as one types it into a shell."""
    return shlex.join(command)

"""Reads the network interfaces of a machine, and says which of them training uses."""

from __future__ import annotations

import re
from dataclasses import replace

from meshwright.cluster.host import Host
from meshwright.cluster.spec import Link, LinkKind
from meshwright.records import BytesPerSecond, record
from meshwright.units import format_bandwidth

USUAL_NETWORK = Link(bandwidth=1.25e9, latency=50e-6)
"""10 Gbit/s Ethernet with TCP: assumed if the machine does not report the speed of its network."""
RDMA_STEP = 5e-6
"""Seconds of a message through InfiniBand or RoCE."""
_ADAPTERS = "/sys/class/infiniband"
_CARDS = "/sys/class/net"
_LAYERS: dict[str, LinkKind] = {"InfiniBand": "infiniband", "Ethernet": "roce"}
_NAMES = {"infiniband": "InfiniBand", "roce": "RoCE"}


@record
class Adapter:
    """Describes one port of a network adapter as the kernel reports it."""

    name: str
    bandwidth: BytesPerSecond | None
    """Line rate; None if it is not reported."""
    kind: LinkKind = "ethernet"


def read_default_interface(routes: str) -> str | None:
    """Returns the interface of the default route in the text of `/proc/net/route`."""
    for line in routes.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 7 and columns[1] == columns[7] == "00000000":
            return columns[0]
    return None


def read_speed(text: str) -> BytesPerSecond | None:
    """Parses bytes per second from `/sys/class/net/*/speed`, which is in Mbit/s, or -1 if it is not
    known."""
    speed = text.strip()
    return int(speed) * 1e6 / 8 if re.fullmatch(r"[1-9]\d*", speed) else None


def read_rate(text: str) -> BytesPerSecond | None:
    """Parses bytes per second from the `rate` of an adapter's port: `200 Gb/sec (4X HDR)`."""
    match = re.match(r"(\d+(?:\.\d+)?) Gb/sec", text)
    return float(match[1]) * 1e9 / 8 if match and float(match[1]) > 0 else None


def read_adapters(host: Host) -> tuple[Adapter, ...]:
    """Returns the ports of InfiniBand and RoCE adapters that are active."""
    found = []
    for name in host.names(_ADAPTERS):
        for port in host.names(f"{_ADAPTERS}/{name}/ports"):
            place = f"{_ADAPTERS}/{name}/ports/{port}"
            kind = _LAYERS.get(host.read(f"{place}/link_layer").strip())
            if kind and "ACTIVE" in host.read(f"{place}/state"):
                rate = read_rate(host.read(f"{place}/rate"))
                found.append(Adapter(name=f"{name}:{port}", bandwidth=rate, kind=kind))
    return tuple(found)


def read_cards(host: Host) -> tuple[Adapter, ...]:
    """Returns the network cards that are up; virtual interfaces have no device behind them."""
    return tuple(
        Adapter(name=name, bandwidth=read_speed(host.read(f"{_CARDS}/{name}/speed")))
        for name in host.names(_CARDS)
        if "device" in host.names(f"{_CARDS}/{name}")
        and host.read(f"{_CARDS}/{name}/operstate").strip() == "up"
    )


def read_network(host: Host) -> tuple[Link | None, tuple[str, ...]]:
    """Returns the network that training uses, and notes on which interfaces are used, and why.

    NCCL takes all adapters with remote memory access that are active, InfiniBand before RoCE; else
    the interface of the default route is taken. None if no speed is reported.
    """
    adapters, cards = read_adapters(host), read_cards(host)
    for kind in ("infiniband", "roce"):
        used = [each for each in adapters if each.kind == kind and each.bandwidth]
        if used:
            link, note = _together(used)
            rest = [each for each in (*adapters, *cards) if each not in used]
            return link, (note, *_unused(rest, f"NCCL takes {_NAMES[kind]} where there is some"))
    route = read_default_interface(host.read("/proc/net/route"))
    speed = read_speed(host.read(f"{_CARDS}/{route}/speed")) if route else None
    rest = [each for each in cards if each.name != route]
    notes = _unused(rest, f"the default route is through {route}") if route else ()
    if speed is None:
        return None, notes
    chosen = f"network: {route}, {format_bandwidth(speed)} as it reports: the default route"
    own = (f"{chosen} is through it; NOT MEASURED.",) if notes else ()
    return replace(USUAL_NETWORK, bandwidth=speed), (*own, *notes)


def _together(used: list[Adapter]) -> tuple[Link, str]:
    """Returns the network that several adapters are together, and a note on it."""
    rates = [each.bandwidth or 0.0 for each in used]
    kind, total = used[0].kind, sum(rates)
    names = ", ".join(each.name for each in used)
    note = (
        f"network: {_NAMES[kind]}, {names}, {format_bandwidth(total)} together as they report; "
        "NCCL uses all that are active. NOT MEASURED."
    )
    return Link(bandwidth=total, latency=RDMA_STEP, kind=kind), note


def _unused(rest: list[Adapter], why: str) -> tuple[str, ...]:
    if not rest:
        return ()
    told = ", ".join(
        f"{each.name} ({format_bandwidth(each.bandwidth) if each.bandwidth else 'speed not told'})"
        for each in rest
    )
    return (f"network: not used: {told}; {why}.",)

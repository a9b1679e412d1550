"""Names the resources of a cluster, and lists what they carry."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.cluster.topology import Resource
from meshwright.records import record
from meshwright.simulate.traffic import LinkLoad


@record
class NamedLoad:
    """Says how many bytes one resource carries in a step, as `--json` prints it."""

    name: str
    bytes: float
    seconds: float
    """Least time in which the bytes pass."""


def resource_name(resource: Resource) -> str:
    """Names a resource for people: `a:0 out`, `a:0 island out`, `a:0 network flow out`, `b bus`, `c
    network in`, `home uplink out`, `a > b`.

    A resource with one capacity for both directions has no direction in its name; if it is an
    explicit link, it reads `a - b`.
    """
    if resource.kind == "link":
        arrow = "-" if resource.direction == "both" else ">"
        return f"{resource.owner} {arrow} {resource.peer}"
    words = [resource.owner]
    if resource.kind == "flow":
        words.append(resource.peer)
    if resource.kind != "port":
        words.append(resource.kind)
    if resource.direction != "both":
        words.append(resource.direction)
    return " ".join(words)


def named_loads(loads: Iterable[LinkLoad]) -> tuple[NamedLoad, ...]:
    """Returns the loads with names, longest busy first, and by name among equals."""
    named = (
        NamedLoad(name=resource_name(load.resource), bytes=load.bytes, seconds=load.seconds)
        for load in loads
    )
    return tuple(sorted(named, key=lambda load: (-load.seconds, load.name)))

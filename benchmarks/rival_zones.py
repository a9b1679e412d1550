"""The devices of a cluster as rival planners see them: tensor groups of one type at one site."""

from __future__ import annotations

from meshwright.search.costs import Costs, TensorGroup, pace
from meshwright.search.space import tensor_groups, usable_devices

Zones = dict[tuple[str, str], tuple[TensorGroup, ...]]
"""Tensor groups of one width, by type and site."""


def zones(costs: Costs, tensor: int) -> Zones:
    """The tensor groups of `tensor` devices; at each type and site those of the kind of node on
    which they are fastest come first, node by node."""
    nodes = {node.name: node for node in costs.cluster.nodes}
    by_node: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs):
        by_node.setdefault((device.node, device.type), []).append(device.name)
    alike: dict[tuple[tuple[str, str], object], list[TensorGroup]] = {}
    for (name, kind), names in by_node.items():
        node = nodes[name]
        key = (kind, node.site), (node.inside, node.islands, node.network, len(node.devices))
        alike.setdefault(key, []).extend(tensor_groups(costs, names, tensor))
    able = [(zone, groups) for (zone, _), groups in alike.items() if groups]
    found: Zones = {}
    for zone, groups in sorted(able, key=lambda each: pace(costs, each[1][0])):
        found[zone] = (*found.get(zone, ()), *groups)
    return found

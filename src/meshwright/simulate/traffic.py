"""Sums the bytes that one step sends over each link of a cluster."""

from __future__ import annotations

from collections import Counter

from meshwright.cluster.topology import Resource, topology
from meshwright.cost.priced_plan import PricedPlan
from meshwright.records import record
from meshwright.techniques import provided


@record
class LinkLoad:
    """Holds what one resource of the cluster carries in a step."""

    resource: Resource
    bytes: float
    seconds: float
    """The least time in which the bytes pass: bytes / bandwidth."""


def link_loads(priced: PricedPlan) -> tuple[LinkLoad, ...]:
    """Returns what every resource that carries bytes carries in a step of a plan.

    A message counts once, at its sender, and a collective once, at its first member; what
    techniques send inside forward and backward counts too.
    """
    carried: Counter[Resource] = Counter()
    priced_ranks = zip(priced.program.ranks, priced.prices.ranks, strict=True)
    for rank, (instructions, costs) in enumerate(priced_ranks):
        for instruction, cost in zip(instructions, costs, strict=True):
            alone = instruction.op.kind == "send" or not instruction.ranks
            if alone or min(instruction.ranks) == rank:
                carried.update(cost.traffic.bytes_by_resource)
    links = topology(priced.cluster)
    for inner_traffic in provided("price", "inner_traffic"):
        carried.update(inner_traffic(priced.plan, priced.model, links))
    bandwidth = priced.prices.bandwidth
    return tuple(
        LinkLoad(resource=each, bytes=size, seconds=size / bandwidth[each])
        for each, size in carried.items()
        if size > 0
    )

"""Sums the bytes that one step sends over each link of a cluster."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from meshwright.cluster.topology import Resource, Topology, topology
from meshwright.cost.collective import Traffic, all_reduce
from meshwright.cost.priced_plan import PricedPlan
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Plan
from meshwright.records import record


@record
class LinkLoad:
    """Holds what one resource of the cluster carries in a step."""

    resource: Resource
    bytes: float
    seconds: float
    """The least time in which the bytes pass: bytes / bandwidth."""


def link_loads(priced: PricedPlan) -> tuple[LinkLoad, ...]:
    """Returns what every resource that carries bytes carries in a step of a plan.

    A message counts once, at its sender, and a collective once, at its first member; the
    tensor-parallel all-reduces inside forward and backward count too.
    """
    carried: Counter[Resource] = Counter()
    priced_ranks = zip(priced.program.ranks, priced.prices.ranks, strict=True)
    for rank, (instructions, costs) in enumerate(priced_ranks):
        for instruction, cost in zip(instructions, costs, strict=True):
            alone = instruction.op.kind == "send" or not instruction.ranks
            if alone or min(instruction.ranks) == rank:
                carried.update(cost.traffic.bytes_by_resource)
    links = topology(priced.cluster)
    carried.update(_tensor_parallel(priced.plan, priced.model, links))
    bandwidth = priced.prices.bandwidth
    return tuple(
        LinkLoad(resource=each, bytes=size, seconds=size / bandwidth[each])
        for each, size in carried.items()
        if size > 0
    )


def _tensor_parallel(plan: Plan, model: LayerGraph, links: Topology) -> Mapping[Resource, float]:
    """Returns the bytes by resource of the all-reduces inside layers: micro-batches x rows x bytes
    of a row."""
    carried: dict[Resource, float] = defaultdict(float)
    for stage in stage_placements(plan):
        layers = model.layers[stage.layers[0] : stage.layers[1]]
        row_bytes = sum(
            sum(each.forward_all_reduce_bytes) + sum(each.backward_all_reduce_bytes)
            for each in (layer.along("tensor") for layer in layers)
        )
        for group in stage.mesh.groups("tensor"):
            rows = group[0].rows[1] - group[0].rows[0]
            size = plan.pipelines[stage.pipeline].micro_batches * rows * row_bytes
            traffic: Traffic = all_reduce(links, [placement.device for placement in group], size)
            for resource, each in traffic.bytes_by_resource.items():
                carried[resource] += each
    return carried

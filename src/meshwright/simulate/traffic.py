"""Sums the bytes that one step sends over each link of a cluster."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import Resource, Topology, topology
from meshwright.cost.collective import Traffic, all_reduce
from meshwright.cost.instructions import Prices
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Program
from meshwright.records import record


@record
class LinkLoad:
    """Holds what one resource of the cluster carries in a step."""

    resource: Resource
    bytes: float
    seconds: float
    """bytes / bandwidth: the least time in which the bytes pass."""


def link_loads(
    program: Program, prices: Prices, plan: Plan, model: LayerGraph, cluster: Cluster
) -> tuple[LinkLoad, ...]:
    """Return every resource that carries bytes, the one with the most seconds first.

    A message counts once, at its sender, and a collective once, at its first member; the
    tensor-parallel all-reduces inside forward and backward count too.
    """
    carried: Counter[Resource] = Counter()
    for rank, (instructions, costs) in enumerate(zip(program.ranks, prices.ranks, strict=True)):
        for instruction, cost in zip(instructions, costs, strict=True):
            alone = instruction.op.kind == "send" or not instruction.ranks
            if alone or min(instruction.ranks) == rank:
                carried.update(cost.traffic.bytes_by_resource)
    carried.update(_tensor_parallel(plan, model, topology(cluster)))
    loads = (
        LinkLoad(resource=each, bytes=size, seconds=size / prices.bandwidth[each])
        for each, size in carried.items()
        if size > 0
    )
    return tuple(sorted(loads, key=lambda load: (-load.seconds, load.resource)))


def _tensor_parallel(plan: Plan, model: LayerGraph, links: Topology) -> Mapping[Resource, float]:
    """Return the bytes by resource of the all-reduces inside layers: micro-batches x rows x bytes
    of a row."""
    carried: dict[Resource, float] = defaultdict(float)
    for stage in stage_seats(plan):
        layers = model.layers[stage.layers[0] : stage.layers[1]]
        row_bytes = sum(
            sum(layer.forward_all_reduce_bytes) + sum(layer.backward_all_reduce_bytes)
            for layer in layers
        )
        for replica in stage.seats:
            rows = replica[0].rows[1] - replica[0].rows[0]
            size = plan.pipelines[stage.pipeline].micro_batches * rows * row_bytes
            traffic: Traffic = all_reduce(links, [seat.device for seat in replica], size)
            for resource, each in traffic.bytes_by_resource.items():
                carried[resource] += each
    return carried

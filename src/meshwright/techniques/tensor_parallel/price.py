"""Prices the all-reduces by which the devices of a replica sum what they have computed of a
layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from meshwright.cluster.topology import Resource, Topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.times import Array, ReplicaWork
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Plan
from meshwright.techniques.tensor_parallel.model import AXIS


def layer_seconds(work: ReplicaWork, forward: Array, backward: Array) -> tuple[Array, Array]:
    """Adds the all-reduces at the end of each layer's forward and backward.

    All devices of the replica meet in them, and they overlap with nothing.
    """
    if len(work.devices) == 1:
        return forward, backward
    known: dict[float, float] = {}

    def seconds(sizes: tuple[float, ...]) -> float:
        for size in sizes:
            if size not in known:
                traffic = all_reduce(
                    work.links, work.devices, size * work.rows, step_latency=work.step_latency
                )
                known[size] = uncontended_seconds(work.links, traffic)
        return sum(known[size] for size in sizes)

    held = [layer.along(AXIS) for layer in work.model.layers[slice(*work.layers)]]
    return (
        forward + [seconds(each.forward_all_reduce_bytes) for each in held],
        backward + [seconds(each.backward_all_reduce_bytes) for each in held],
    )


def inner_traffic(plan: Plan, model: LayerGraph, links: Topology) -> Mapping[Resource, float]:
    """Returns the bytes by resource of these all-reduces in one step: micro-batches x rows x bytes
    of a row."""
    carried: dict[Resource, float] = defaultdict(float)
    for stage in stage_placements(plan):
        row_bytes = sum(
            sum(each.forward_all_reduce_bytes) + sum(each.backward_all_reduce_bytes)
            for each in (layer.along(AXIS) for layer in model.layers[slice(*stage.layers)])
        )
        for group in stage.mesh.groups(AXIS):
            rows = group[0].rows[1] - group[0].rows[0]
            size = plan.pipelines[stage.pipeline].micro_batches * rows * row_bytes
            traffic = all_reduce(links, [placement.device for placement in group], size)
            for resource, each in traffic.bytes_by_resource.items():
                carried[resource] += each
    return carried

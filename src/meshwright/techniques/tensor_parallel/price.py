"""Prices the all-reduces by which the devices of a replica sum what they have computed of a
layer."""

from __future__ import annotations

from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.times import Array, ReplicaWork
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

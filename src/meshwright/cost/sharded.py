"""A step with parameters, gradients and optimizer states divided among all devices (ZeRO, FSDP).

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020;
Zhao et al., "PyTorch FSDP", 2023. Layers gather their parameters just before they are used, and
scatter their gradients just after these are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.collective import all_gather, alone_seconds, reduce_scatter
from meshwright.cost.compute import LayerSeconds, layer_seconds, optimizer_seconds
from meshwright.cost.constants import system_constants
from meshwright.cost.links import overhead_seconds, reached_links, ring_step
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.records import record

Array = NDArray[np.float64]

Sharding = Literal["full", "gradients"]
"""full: parameters are gathered anew for every backward (ZeRO-3); gradients: they stay gathered
from forward to backward (ZeRO-2, SHARD_GRAD_OP)."""


@record
class ShardedStep:
    """How a sharded data-parallel step works through its share of the batch."""

    rows: int
    """Of a micro-batch on each device."""
    micro_batches: int
    sharding: Sharding = "full"
    recompute: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"


def with_recomputation(seconds: LayerSeconds, model: LayerGraph) -> LayerSeconds:
    """Layers that keep only their input and repeat their forward before their backward (Chen et
    al. 2016): backward + forward, of every layer with attention; first and last layers keep
    what they made."""
    repeats = np.array([float(layer.attention_flops > 0) for layer in model.layers])
    return LayerSeconds(
        forward=seconds.forward,
        backward=seconds.backward + repeats * seconds.forward,
        measured=seconds.measured,
    )


def overlapped(compute: Array, communication: Array, exposure: float) -> Array:
    """Two things at once: the longer one, and the exposed share of the shorter.

    max(c, m) + x min(c, m); x = 0 hides all that can be hidden, x = 1 nothing.
    """
    result: Array = np.maximum(compute, communication) + exposure * np.minimum(
        compute, communication
    )
    return result


def shard_seconds(
    model: LayerGraph, links: Topology, devices: Sequence[str], step_latency: float, width: float
) -> tuple[Array, Array]:
    """Seconds of each layer to gather its parameters, and to scatter their gradients.

    16-bit (or fp32) parameters travel; gradients, of what is trained, at `width` of four bytes. A
    tied parameter travels with its first layer.
    """
    trained = np.array([float(layer.parameters) for layer in model.layers])
    frozen = np.array([float(layer.frozen_parameters) for layer in model.layers])
    for tied in model.tied:
        trained[tied.layers[0]] += tied.parameters
        frozen[tied.layers[0]] += tied.frozen_parameters
    size = 2.0 if model.precision in ("fp16", "bf16") else 4.0
    counts = [*zip(trained, trained + frozen, strict=True)]
    cost: dict[tuple[float, float], tuple[float, float]] = {}
    for own, held in set(counts):
        gather = all_gather(links, devices, held * size, step_latency=step_latency)
        scatter = reduce_scatter(links, devices, own * 4.0 * width, step_latency=step_latency)
        cost[own, held] = (alone_seconds(links, gather), alone_seconds(links, scatter))
    pairs = np.array([cost[each] for each in counts]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def sharded_step_seconds(
    model: LayerGraph, cluster: Cluster, step: ShardedStep, profile: Profile | None = None
) -> float:
    """Seconds of one step on all devices of a cluster, the slowest type setting the pace.

        micro-batches x sum over layers of
            forward | gather, and backward | gather (full) + scatter
        + optimizer of each device's share + overhead

    `|` is `overlapped`. Raises ClusterError where a device does not offer the model's precision.
    """
    kinds = sorted({device.type for device in devices_of(cluster)})
    devices = [device.name for device in devices_of(cluster)]
    links = topology(reached_links(cluster, profile))
    constants = system_constants(profile.calibration if profile else None)
    gather, scatter = shard_seconds(
        model, links, devices, ring_step(profile), constants.gradient_width
    )
    again = gather if step.sharding == "full" else np.zeros(len(gather))
    slowest = 0.0
    for kind in kinds:
        device = cluster.types[kind]
        seconds = layer_seconds(model, device, 1, step.rows, profile)
        if step.recompute:
            seconds = with_recomputation(seconds, model)
        forward = overlapped(seconds.forward, gather, constants.shard_exposure)
        backward = overlapped(seconds.backward, again + scatter, constants.shard_exposure)
        share = num_parameters(model) / len(devices)
        update = optimizer_seconds(device, step.optimizer, share, profile, model.precision)
        once = float((forward + backward).sum())
        slowest = max(slowest, step.micro_batches * once + update)
    return slowest + overhead_seconds(profile)

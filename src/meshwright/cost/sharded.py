"""Predicts a step with parameters, gradients and optimizer states sharded over all devices (ZeRO,
FSDP).

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020;
Zhao et al., "PyTorch FSDP", 2023. A layer's parameters are gathered just before they are used, and
its gradients are reduced and scattered as soon as they are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.collective import all_gather, reduce_scatter, uncontended_seconds
from meshwright.cost.compute import LayerSeconds, layer_seconds, optimizer_seconds
from meshwright.cost.constants import system_constants
from meshwright.cost.links import overhead_seconds, ring_step_seconds
from meshwright.cost.profile import Profile
from meshwright.cost.reached_links import reached_links
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.records import record

Array = NDArray[np.float64]

Sharding = Literal["full", "gradients"]
""""full" gathers the parameters again for every backward (ZeRO-3); "gradients" keeps them gathered
from forward to backward (ZeRO-2, SHARD_GRAD_OP)."""


@record
class ShardedStep:
    """Describes how a sharded data-parallel step works through each device's share of the batch."""

    rows: int
    """The rows of a micro-batch on each device."""
    micro_batches: int
    sharding: Sharding = "full"
    recompute: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"


def seconds_with_recomputation(seconds: LayerSeconds, model: LayerGraph) -> LayerSeconds:
    """Adds the repeated forwards of activation recomputation (Chen et al. 2016) to the backwards.

    Every layer with attention keeps only its input and repeats its forward before its backward; the
    first and last layers keep their activations.
    """
    repeats = np.array([float(layer.attention_flops > 0) for layer in model.layers])
    return LayerSeconds(
        forward=seconds.forward,
        backward=seconds.backward + repeats * seconds.forward,
        measured=seconds.measured,
    )


def overlapped(compute: Array, communication: Array, exposure: float) -> Array:
    """Returns the seconds of overlapping compute and communication.

        max(c, m) + x min(c, m)

    The exposure x is the share of the shorter one that is not hidden behind the longer one.
    """
    result: Array = np.maximum(compute, communication) + exposure * np.minimum(
        compute, communication
    )
    return result


def shard_seconds(
    model: LayerGraph, links: Topology, devices: Sequence[str], step_latency: float, width: float
) -> tuple[Array, Array]:
    """Returns the seconds of each layer to gather its parameters, and to reduce and scatter its
    gradients.

    Parameters travel in 16 bits (or fp32); a gradient takes 4 * `width` bytes of each trained
    parameter. A tied parameter travels with its first layer.
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
        cost[own, held] = (uncontended_seconds(links, gather), uncontended_seconds(links, scatter))
    pairs = np.array([cost[each] for each in counts]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def sharded_step_seconds(
    model: LayerGraph, cluster: Cluster, step: ShardedStep, profile: Profile | None = None
) -> float:
    """Returns the seconds of one step on all devices of a cluster; the slowest device type decides.

        micro-batches x sum over layers of
            forward | gather, and backward | gather (full) + scatter
        + optimizer of each device's share + overhead

    `a | b` stands for `overlapped(a, b)`. Raises ClusterError if a device does not offer the
    model's precision.
    """
    kinds = sorted({device.type for device in devices_of(cluster)})
    devices = [device.name for device in devices_of(cluster)]
    links = topology(reached_links(cluster, profile))
    constants = system_constants(profile.calibration if profile else None)
    gather, scatter = shard_seconds(
        model, links, devices, ring_step_seconds(profile), constants.gradient_width
    )
    again = gather if step.sharding == "full" else np.zeros(len(gather))
    slowest = 0.0
    for kind in kinds:
        device = cluster.types[kind]
        seconds = layer_seconds(model, device, 1, step.rows, profile)
        if step.recompute:
            seconds = seconds_with_recomputation(seconds, model)
        forward = overlapped(seconds.forward, gather, constants.shard_exposure)
        backward = overlapped(seconds.backward, again + scatter, constants.shard_exposure)
        share = num_parameters(model) / len(devices)
        update = optimizer_seconds(device, step.optimizer, share, profile, model.precision)
        once = float((forward + backward).sum())
        slowest = max(slowest, step.micro_batches * once + update)
    return slowest + overhead_seconds(profile)

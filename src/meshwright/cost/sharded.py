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
from meshwright.cost.collective import (
    all_gather,
    all_reduce,
    reduce_scatter,
    uncontended_seconds,
)
from meshwright.cost.compute import LayerSeconds, layer_seconds, optimizer_seconds
from meshwright.cost.constants import system_constants
from meshwright.cost.links import overhead_seconds, ring_step_seconds
from meshwright.cost.memory import framework_bytes
from meshwright.cost.profile import Profile
from meshwright.cost.reached_links import reached_links
from meshwright.cost.weights import bytes_per_parameter
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.plan.spec import DeviceMemory
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
    within_nodes: bool = False
    """True if the devices of each node divide a copy of their own (HSDP); gradients are then summed
    over the nodes in the last micro-batch."""


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


def _sharers(cluster: Cluster, step: ShardedStep) -> list[str]:
    """Returns the devices that divide one copy of the weights: all, or those of the first node."""
    node = cluster.nodes[0].name if step.within_nodes else None
    every = devices_of(cluster)
    return [device.name for device in every if node is None or device.node == node]


def _copies_seconds(
    model: LayerGraph,
    cluster: Cluster,
    step: ShardedStep,
    links: Topology,
    step_latency: float,
    width: float,
) -> float:
    """Returns the seconds to sum the gradients of the nodes' copies: the devices of a node share
    its adapters, so all shards together pass as one ring of nodes would pass the whole."""
    if not step.within_nodes or len(cluster.nodes) == 1:
        return 0.0
    first: dict[str, str] = {}
    for device in devices_of(cluster):
        first.setdefault(device.node, device.name)
    size = num_parameters(model) * 4.0 * width
    ring = all_reduce(links, list(first.values()), size, step_latency=step_latency)
    return uncontended_seconds(links, ring)


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
    devices = _sharers(cluster, step)
    links = topology(reached_links(cluster, profile))
    constants = system_constants(profile.calibration if profile else None)
    latency = ring_step_seconds(profile)
    gather, scatter = shard_seconds(model, links, devices, latency, constants.gradient_width)
    copies = _copies_seconds(model, cluster, step, links, latency, constants.gradient_width)
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
        last = backward.sum(keepdims=True)
        beside = overlapped(last, np.array([copies]), constants.shard_exposure) - last
        slowest = max(slowest, step.micro_batches * once + float(beside[0]) + update)
    return slowest + overhead_seconds(profile)


PREFETCHED = 2
"""Layers whose weights are gathered at once: FSDP gathers one unit ahead of the one in use."""


def sharded_memory_bytes(
    model: LayerGraph, cluster: Cluster, step: ShardedStep, whole: DeviceMemory
) -> float:
    """Returns the peak bytes of tensors on each of the devices that divide a model's states.

    `whole` is the memory of one device that holds all of them and works on the same rows. Its
    activations and temporaries stay; weights, gradients and optimizer states are divided. Two
    gathered layers and the gradient of one, in 16 bits (or fp32), take the place of the casts of
    all weights. "gradients" keeps all layers gathered.
    """
    ways = len(_sharers(cluster, step))
    unit = bytes_per_parameter(model.precision, step.optimizer)
    trained = num_parameters(model)
    size = unit.casts or unit.weights
    largest = max(layer.parameters + layer.frozen_parameters for layer in model.layers)
    gathered = PREFETCHED * largest if step.sharding == "full" else trained
    states = (whole.parameters + whole.gradients + whole.optimizer) / ways
    kinds = {device.type for device in devices_of(cluster)}
    reserved = min(framework_bytes(cluster.types[kind]) for kind in kinds)
    temporaries = whole.buffers - reserved - unit.casts * trained
    return states + (gathered + largest) * size + whole.activations + temporaries

"""Estimates steps with perfectly balanced stages, for whole arrays of depths at once.

The estimates are optimistic, for they take layers to be divisible: they tell which templates are
worth cutting. Letters: D ways to give every class its depth, F classes of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.plan.spec import ScheduleName
from meshwright.search.costs import Array
from meshwright.search.template_estimate import EstimateContext, Ints, group_facts, hop_latency

HIDDEN = 0.6
"""Share of a stage's seconds that its reductions overlap with: its last backward, about two thirds,
less what has to be done before the first bucket is full."""


@dataclass(frozen=True, slots=True)
class Build:
    """A template without its depths."""

    order: tuple[int, ...]
    """Device classes."""
    tensor: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    rows: int
    """Rows of a micro-batch over all replicas."""
    schedule: ScheduleName


def balanced(context: EstimateContext, build: Build, micro_batches: float, grid_DF: Ints) -> Array:
    """Seconds [D] of a step; infinite where not even all devices together have the memory."""
    facts = [
        group_facts(context, i, build.tensor, build.rows // width)
        for i, width in zip(build.order, build.widths, strict=True)
    ]
    depth_D = grid_DF.sum(axis=1)
    rate_D: Array = grid_DF @ np.array([1 / each.whole for each in facts])
    room_D: Array = grid_DF @ np.array([each.room for each in facts])
    crowd_D = -(-context.common[1] // depth_D) * min(each.common for each in facts)
    slowest_D = np.maximum(1 / rate_D, np.maximum(crowd_D, min(f.longest for f in facts)))
    moved = _transfer(context, build)
    trip_D = depth_D * (slowest_D + 2 * moved)
    steady_D = (micro_batches - 1) * np.maximum(slowest_D, moved)
    need = max(each.always + each.each for each in facts)
    if build.schedule == "1f1b":
        waits_D = trip_D * (micro_batches / np.minimum(depth_D, micro_batches) - 1)
        steady_D = np.maximum(steady_D, waits_D)
    else:
        need += (micro_batches - 1) * max(each.each for each in facts)
    exposed_D = np.maximum(_reduction(context, build, grid_DF, depth_D) - HIDDEN * slowest_D, 0.0)
    devices_D = grid_DF @ np.array(build.widths) * build.tensor
    hop = max(hop_latency(context.costs, context.classes[i].network) for i in build.order)
    total_D = trip_D + steady_D + exposed_D + 2 * (devices_D - 1) * hop
    return np.where(need <= room_D, total_D, np.inf)


def _transfer(context: EstimateContext, build: Build) -> float:
    """Seconds of a usual activation between neighbouring stages: of as many as stand on one node,
    the last one sends to another node."""
    moved = 0.0
    for i, width, block in zip(build.order, build.widths, build.blocks, strict=True):
        device_class, own = context.classes[i], build.rows / width * context.widest_cut
        per_node = device_class.each // build.tensor // block
        across = (
            own * block * build.tensor / device_class.network.bandwidth
            + device_class.network.latency
        )
        inside = own / device_class.inside.bandwidth + device_class.inside.latency
        moved = max(moved, (across + (per_node - 1) * inside) / per_node)
    return moved


def _reduction(context: EstimateContext, build: Build, grid_DF: Ints, depth_D: Ints) -> Array:
    """Seconds [D] of a stage's gradients; those of all stages of a node share its network."""
    worst_D: Array = np.zeros(len(grid_DF))
    for f, (i, width, block) in enumerate(
        zip(build.order, build.widths, build.blocks, strict=True)
    ):
        device_class = context.classes[i]
        own_D = 2 * (1 - 1 / width) * context.gradients / depth_D
        if width > block:
            run_D = np.minimum(device_class.each // build.tensor // block, grid_DF[:, f])
            ring = 2 * (width - 1) * hop_latency(context.costs, device_class.network)
            worst_D = np.maximum(worst_D, own_D * run_D / device_class.network.bandwidth + ring)
        elif width > 1:
            worst_D = np.maximum(worst_D, own_D / build.tensor / device_class.inside.bandwidth)
    return worst_D

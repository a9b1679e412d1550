"""Estimates steps with perfectly balanced stages, for whole arrays of pipelines at once.

The estimates are optimistic, for they take layers to be divisible: they tell which templates are
worth cutting. Letters: B builds, F classes of a pipeline, P pipelines: builds with a depth for
every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.search.costs import Array
from meshwright.search.device_classes import DeviceClass
from meshwright.search.pipeline_seconds import Order
from meshwright.search.template_estimate import (
    EstimateContext,
    Ints,
    group_facts,
    hop_latency,
    uplinks_between,
)

HIDDEN = 0.6
"""Share of a stage's seconds that its reductions overlap with: its last backward, about two thirds,
less what has to be done before the first bucket is full."""

DRAINED = 0.7
"""Share of a micro-batch's seconds that it keeps other stages waiting in the best order: they need
not wait for weight gradients."""


@dataclass(frozen=True, slots=True)
class Builds:
    """Holds templates without their depths, on the same classes with the same tensor widths."""

    order: tuple[int, ...]
    """Device classes."""
    tensors: tuple[int, ...]
    """Devices of a replica on each of them."""
    widths: Ints
    """Replicas of a stage [B, F]."""
    blocks: Ints
    """Replicas beside each other on a node [B, F]."""
    rows: Ints
    """Rows [B] of a micro-batch."""


def balanced(
    context: EstimateContext, builds: Builds, share: float, build_P: Ints, depths_FP: Ints
) -> Array:
    """Returns the seconds [P] of a step over `share` rows; infinite where not even all devices of a
    pipeline together have the memory."""
    facts_FBX = [
        facts_by_build(context, i, tensor, builds.rows // builds.widths[:, f])
        for f, (i, tensor) in enumerate(zip(builds.order, builds.tensors, strict=True))
    ]
    longest_B, common_B = (np.min([each[:, x] for each in facts_FBX], axis=0) for x in (1, 2))
    each_B = np.maximum(1.0, np.max([each[:, 4] for each in facts_FBX], axis=0))
    always_B = np.max([each[:, 3] for each in facts_FBX], axis=0)
    depth_P = depths_FP.sum(axis=0)
    rate_P, room_P, devices_P = (np.zeros(len(build_P)) for _ in range(3))
    for f, each in enumerate(facts_FBX):
        rate_P += depths_FP[f] * (1 / each[:, 0])[build_P]
        room_P += depths_FP[f] * each[0, 5]
        devices_P += depths_FP[f] * (builds.widths[:, f] * builds.tensors[f])[build_P]
    crowd_P = -(-context.common[1] // depth_P) * common_B[build_P]
    slowest_P = np.maximum(1 / rate_P, np.maximum(crowd_P, longest_B[build_P]))
    moved_P, (late, carried_B) = _transfer(context, builds)[build_P], _across_sites(context, builds)
    drained = DRAINED if context.order == "best" else 1.0
    trip_P = depth_P * (drained * slowest_P + 2 * moved_P) + 2 * (late + carried_B[build_P])
    exposed_P = _reduction(context, builds, build_P, depths_FP, depth_P) - HIDDEN * slowest_P
    hop = max(hop_latency(context.costs, context.classes[i].network) for i in builds.order)
    rest_P = np.maximum(exposed_P, 0.0) + 2 * (devices_P - 1) * hop
    count_P = (share / builds.rows)[build_P]
    pace_P = np.maximum(slowest_P, np.maximum(moved_P, carried_B[build_P]))
    held_P = _held(context.order, count_P, depth_P, (room_P - always_B[build_P]) / each_B[build_P])
    waits_P = trip_P * (count_P / np.clip(held_P, 1.0, count_P) - 1)
    total_P = trip_P + np.maximum((count_P - 1) * pace_P, waits_P) + rest_P
    found: Array = np.where(held_P >= 1.0, total_P, np.inf)
    return found


def _held(order: Order, count_P: Array, depth_P: Ints, room_P: Array) -> Array:
    """Returns the micro-batches in flight [P] for which there is room; 0 where that is too few."""
    if order == "gpipe":
        return np.where(room_P >= count_P, count_P, 0.0)
    return room_P if order == "best" else np.where(room_P >= 1.0, depth_P, 0.0)


def facts_by_build(context: EstimateContext, device_class: int, tensor: int, rows_B: Ints) -> Array:
    """Returns the fields [B, 6] of `group_facts`."""
    known, at_B = np.unique(rows_B, return_inverse=True)
    table = [group_facts(context, device_class, tensor, rows) for rows in known.tolist()]
    found: Array = np.array(table, dtype=np.float64).reshape(-1, 6)[at_B]
    return found


def _transfer(context: EstimateContext, builds: Builds) -> Array:
    """Returns the seconds [B] of a usual activation between neighbouring stages: of as many as
    stand on one node, the last one sends to another node."""
    moved_B: Array = np.zeros(len(builds.rows))
    for i, tensor, width_B, block_B in _by_class(builds):
        inside, network = context.classes[i].inside, context.classes[i].network
        joined = context.classes[i].joined
        own_B = builds.rows / width_B * context.widest_cut
        run_B = context.classes[i].each // tensor // block_B
        across_B = own_B * block_B * tensor / network.bandwidth + network.latency
        inside_B = own_B / inside.bandwidth + inside.latency
        joined_B = own_B / joined.bandwidth + joined.latency
        between_B = -(-run_B // _per_island(context.classes[i], tensor, block_B)) - 1
        within_B = run_B - 1 - between_B
        sum_B = across_B + between_B * inside_B + within_B * joined_B
        moved_B = np.maximum(moved_B, sum_B / run_B)
    return moved_B


def _per_island(device_class: DeviceClass, tensor: int, block_B: Ints) -> Ints:
    """Returns the number of stages [B] that stand on one island; 1 if one needs several."""
    found: Ints = np.maximum(device_class.island // tensor // block_B, 1)
    return found


def _across_sites(context: EstimateContext, builds: Builds) -> tuple[float, Array]:
    """Returns the latency of all crossings from site to site, and the seconds [B] of a usual
    activation on the slowest uplink."""
    late, slowest = 0.0, 0.0
    for here, there in zip(builds.order, builds.order[1:], strict=False):
        latency, bandwidth = uplinks_between(context, here, there)
        late += latency
        slowest = max(slowest, 1 / bandwidth)
    size_B: Array = np.asarray(builds.rows * (context.widest_cut * max(builds.tensors)))
    return late, size_B * slowest


def _reduction(
    context: EstimateContext, builds: Builds, build_P: Ints, depths_FP: Ints, depth_P: Ints
) -> Array:
    """Returns the seconds [P] of a stage's gradients; the stages of a node share its network."""
    worst_P: Array = np.zeros(len(build_P))
    for f, (i, tensor, width_B, block_B) in enumerate(_by_class(builds)):
        device_class, network = context.classes[i], context.classes[i].network
        across_B = width_B > block_B
        own_B = 2 * (1 - 1 / width_B) * context.gradients
        among = [device_class.link_among(block * tensor) for block in block_B.tolist()]
        inside_B = np.array([link.bandwidth for link in among])
        own_B /= np.where(across_B, network.bandwidth, tensor * inside_B)
        ring_B = across_B * 2 * (width_B - 1) * hop_latency(context.costs, network)
        run_B = np.where(across_B, context.classes[i].each // tensor // block_B, 1)
        run_P = np.minimum(run_B[build_P], depths_FP[f])
        worst_P = np.maximum(worst_P, own_B[build_P] / depth_P * run_P + ring_B[build_P])
    return worst_P


def _by_class(builds: Builds) -> Sequence[tuple[int, int, Ints, Ints]]:
    columns = builds.order, builds.tensors, builds.widths.T, builds.blocks.T
    return list(zip(*columns, strict=True))

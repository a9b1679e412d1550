"""Estimates steps with perfectly balanced stages, for whole arrays of pipelines at once.

The estimates are optimistic, for they take layers to be divisible: they tell which templates are
worth cutting. Letters: B builds, F classes of a pipeline, P pipelines: builds with a depth for
every class, C schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.plan.spec import ScheduleName
from meshwright.search.costs import Array
from meshwright.search.template_estimate import EstimateContext, Ints, group_facts, hop_latency

HIDDEN = 0.6
"""Share of a stage's seconds that its reductions overlap with: its last backward, about two thirds,
less what has to be done before the first bucket is full."""


@dataclass(frozen=True, slots=True)
class Builds:
    """Templates without their depths and schedules, on the same classes."""

    order: tuple[int, ...]
    """Device classes."""
    tensor: int
    widths: Ints
    """Replicas of a stage [B, F]."""
    blocks: Ints
    """Replicas beside each other on a node [B, F]."""
    rows: Ints
    """Rows [B] of a micro-batch."""


def balanced(
    context: EstimateContext,
    builds: Builds,
    schedules: Sequence[ScheduleName],
    share: float,
    build_P: Ints,
    depths_FP: Ints,
) -> Array:
    """Seconds [C, P] of a step over `share` rows; infinite where not even all devices of a pipeline
    together have the memory."""
    facts_FBX = [
        facts_by_build(context, i, builds.tensor, builds.rows // builds.widths[:, f])
        for f, i in enumerate(builds.order)
    ]
    longest_B, common_B = (np.min([each[:, x] for each in facts_FBX], axis=0) for x in (1, 2))
    each_B = np.max([each[:, 4] for each in facts_FBX], axis=0)
    need_B = np.max([each[:, 3] + each[:, 4] for each in facts_FBX], axis=0)
    count_B = share / builds.rows
    depth_P = depths_FP.sum(axis=0)
    rate_P, room_P, devices_P = (np.zeros(len(build_P)) for _ in range(3))
    for f, each in enumerate(facts_FBX):
        rate_P += depths_FP[f] * (1 / each[:, 0])[build_P]
        room_P += depths_FP[f] * each[0, 5]
        devices_P += depths_FP[f] * builds.widths[build_P, f]
    crowd_P = -(-context.common[1] // depth_P) * common_B[build_P]
    slowest_P = np.maximum(1 / rate_P, np.maximum(crowd_P, longest_B[build_P]))
    moved_P = _transfer(context, builds)[build_P]
    trip_P = depth_P * (slowest_P + 2 * moved_P)
    exposed_P = _reduction(context, builds, build_P, depths_FP, depth_P) - HIDDEN * slowest_P
    hop = max(hop_latency(context.costs, context.classes[i].network) for i in builds.order)
    rest_P = np.maximum(exposed_P, 0.0) + 2 * (devices_P * builds.tensor - 1) * hop
    count_P = count_B[build_P]
    steady_P = (count_P - 1) * np.maximum(slowest_P, moved_P)
    found = np.empty((len(schedules), len(build_P)))
    for c, schedule in enumerate(schedules):
        if schedule == "1f1b":
            waits_P = trip_P * (count_P / np.minimum(depth_P, count_P) - 1)
            total_P, needed_B = trip_P + np.maximum(steady_P, waits_P) + rest_P, need_B
        else:
            total_P, needed_B = trip_P + steady_P + rest_P, need_B + (count_B - 1) * each_B
        found[c] = np.where(needed_B[build_P] <= room_P, total_P, np.inf)
    return found


def facts_by_build(context: EstimateContext, device_class: int, tensor: int, rows_B: Ints) -> Array:
    """Returns the fields [B, 6] of `group_facts`."""
    known, at_B = np.unique(rows_B, return_inverse=True)
    table = [group_facts(context, device_class, tensor, rows) for rows in known.tolist()]
    found: Array = np.array(table, dtype=np.float64).reshape(-1, 6)[at_B]
    return found


def _transfer(context: EstimateContext, builds: Builds) -> Array:
    """Seconds [B] of a usual activation between neighbouring stages: of as many as stand on one
    node, the last one sends to another node."""
    moved_B: Array = np.zeros(len(builds.rows))
    for i, width_B, block_B in zip(builds.order, builds.widths.T, builds.blocks.T, strict=True):
        inside, network = context.classes[i].inside, context.classes[i].network
        joined = context.classes[i].joined
        own_B = builds.rows / width_B * context.widest_cut
        run_B = context.classes[i].each // builds.tensor // block_B
        across_B = own_B * block_B * builds.tensor / network.bandwidth + network.latency
        inside_B = own_B / inside.bandwidth + inside.latency
        joined_B = own_B / joined.bandwidth + joined.latency
        between_B = -(-run_B // _per_island(context, i, builds, block_B)) - 1
        within_B = run_B - 1 - between_B
        sum_B = across_B + between_B * inside_B + within_B * joined_B
        moved_B = np.maximum(moved_B, sum_B / run_B)
    return moved_B


def _per_island(context: EstimateContext, device_class: int, builds: Builds, block_B: Ints) -> Ints:
    """Returns the number of stages [B] that stand on one island; 1 if one needs several."""
    found: Ints = np.maximum(context.classes[device_class].island // builds.tensor // block_B, 1)
    return found


def _reduction(
    context: EstimateContext, builds: Builds, build_P: Ints, depths_FP: Ints, depth_P: Ints
) -> Array:
    """Seconds [P] of a stage's gradients; those of all stages of a node share its network."""
    worst_P: Array = np.zeros(len(build_P))
    for f, i in enumerate(builds.order):
        network = context.classes[i].network
        width_B, block_B = builds.widths[:, f], builds.blocks[:, f]
        across_B = width_B > block_B
        own_B = 2 * (1 - 1 / width_B) * context.gradients
        inside_B = np.array([context.classes[i].link_among(b * builds.tensor).bandwidth
                             for b in block_B.tolist()])  # fmt: skip
        own_B /= np.where(across_B, network.bandwidth, builds.tensor * inside_B)
        ring_B = across_B * 2 * (width_B - 1) * hop_latency(context.costs, network)
        run_B = np.where(across_B, context.classes[i].each // builds.tensor // block_B, 1)
        run_P = np.minimum(run_B[build_P], depths_FP[f])
        worst_P = np.maximum(worst_P, own_B[build_P] / depth_P * run_P + ring_B[build_P])
    return worst_P

"""Estimates steps with perfectly balanced stages, for whole arrays of pipelines at once.

The estimates are optimistic, for they take layers to be divisible: they tell which templates are
worth cutting. Letters: B builds, F classes of a pipeline, P pipelines: builds with a depth for
every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cluster.spec import Link, flow_bandwidth
from meshwright.cost.collective import least_sum_steps
from meshwright.search.boundary_prices import copies
from meshwright.search.costs import Array, hop_latency
from meshwright.search.device_classes import DeviceClass
from meshwright.search.pipeline_seconds import Order
from meshwright.search.template_estimate import (
    EstimateContext,
    Ints,
    group_facts,
    uplinks_between,
)

HIDDEN = 0.6
"""Share of a stage's seconds that its reductions overlap with: its last backward, about two thirds,
less what has to be done before the first bucket is full."""

DRAINED = 0.7
"""Share of a micro-batch's seconds that it keeps other stages waiting in the best order: they need
not wait for weight gradients."""


ROUNDING = 1 + 1e-9
"""Times as large as a bound may be by the order in which its parts are added up."""


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


@dataclass(frozen=True, slots=True)
class BuildPrices:
    """Holds what balanced stages take, whatever their depths."""

    builds: Builds
    rates: Array
    """Micro-batches per second [F, B] of a stage on a class that had the whole model."""
    longest: Array
    """Seconds [B] of the longest layer."""
    common: Array
    """Seconds [B] of one layer of the commonest kind."""
    always: Array
    """Bytes [B] on each device, whatever is in flight."""
    each: Array
    """Bytes [B] for every micro-batch in flight."""
    rooms: Array
    """Bytes [F] that a device has."""
    moved: Array
    """Seconds [B] of a usual activation between neighbouring stages."""
    late: float
    """Latency of all crossings from site to site."""
    carried: Array
    """Seconds [B] of a usual activation on the slowest uplink."""
    sums: tuple[tuple[Array, Array, Ints], ...]
    """For each class: the seconds [B] of the whole model's gradients on what they pass, those [B]
    of the ring's hops, and the stages [B] that share the network of a node."""


def build_prices(context: EstimateContext, builds: Builds) -> BuildPrices:
    """Returns the prices of builds."""
    facts_FBX = np.array(
        [
            facts_by_build(context, i, tensor, builds.rows // builds.widths[:, f])
            for f, (i, tensor) in enumerate(zip(builds.order, builds.tensors, strict=True))
        ]
    )
    late, carried_B = _across_sites(context, builds)
    return BuildPrices(
        builds=builds,
        rates=1 / facts_FBX[:, :, 0],
        longest=facts_FBX[:, :, 1].min(axis=0),
        common=facts_FBX[:, :, 2].min(axis=0),
        always=facts_FBX[:, :, 3].max(axis=0),
        each=np.maximum(1.0, facts_FBX[:, :, 4].max(axis=0)),
        rooms=facts_FBX[:, 0, 5],
        moved=_transfer(context, builds),
        late=late,
        carried=carried_B,
        sums=tuple(_reduction(context, *each) for each in _by_class(builds)),
    )


def least_seconds(
    context: EstimateContext, prices: BuildPrices, share: float, of_B: Ints, depths_FD: Ints
) -> Array:
    """Seconds [B, D] below which `balanced` is for no depths of some builds: of the work alone, and
    infinite where not one micro-batch has the memory."""
    depth_D = depths_FD.sum(axis=0)
    slowest_BD = 1 / (prices.rates[:, of_B].T @ depths_FD)
    crowd_D = -(-context.common[1] // depth_D)
    np.maximum(slowest_BD, prices.common[of_B, None] * crowd_D, out=slowest_BD)
    np.maximum(slowest_BD, prices.longest[of_B, None], out=slowest_BD)
    count_B = share / prices.builds.rows[of_B]
    slowest_BD *= _drained(context.order) * depth_D + (count_B[:, None] - 1)
    needed_B = (prices.always + prices.each)[of_B]
    too_small_BD = prices.rooms @ depths_FD * ROUNDING < needed_B[:, None]
    least: Array = np.where(too_small_BD, np.inf, slowest_BD)
    return least


def _drained(order: Order) -> float:
    return DRAINED if order == "best" else 1.0


def balanced(
    context: EstimateContext, prices: BuildPrices, share: float, build_P: Ints, depths_FP: Ints
) -> Array:
    """Returns the seconds [P] of a step over `share` rows; infinite where not even all devices of a
    pipeline together have the memory."""
    builds, depth_P = prices.builds, depths_FP.sum(axis=0)
    rate_P, room_P, devices_P = (np.zeros(len(build_P)) for _ in range(3))
    for f, depths_P in enumerate(depths_FP):
        rate_P += depths_P * prices.rates[f][build_P]
        room_P += depths_P * prices.rooms[f]
        devices_P += depths_P * (builds.widths[:, f] * builds.tensors[f])[build_P]
    crowd_P = -(-context.common[1] // depth_P) * prices.common[build_P]
    slowest_P = np.maximum(1 / rate_P, np.maximum(crowd_P, prices.longest[build_P]))
    moved_P, carried_P = prices.moved[build_P], prices.carried[build_P]
    trip_P = depth_P * (_drained(context.order) * slowest_P + 2 * moved_P)
    trip_P += 2 * (prices.late + carried_P)
    exposed_P = _summed(prices, build_P, depths_FP, depth_P) - HIDDEN * slowest_P
    rest_P = np.maximum(exposed_P, 0.0) + _norm(context, builds.order, devices_P)
    count_P = (share / builds.rows)[build_P]
    pace_P = np.maximum(slowest_P, np.maximum(moved_P, carried_P))
    room_P = (room_P - prices.always[build_P]) / prices.each[build_P]
    held_P = _held(context.order, count_P, depth_P, room_P)
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
        times = copies(context.costs, tensor)
        alone_B = np.maximum(
            block_B * times / network.bandwidth, times / tensor / flow_bandwidth(network)
        )
        across_B = own_B * alone_B + network.latency
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
    size_B: Array = np.asarray(
        builds.rows * (context.widest_cut * copies(context.costs, max(builds.tensors)))
    )
    return late, size_B * slowest


def _reduction(
    context: EstimateContext, number: int, tensor: int, width_B: Ints, block_B: Ints
) -> tuple[Array, Array, Ints]:
    """Returns the seconds [P] of a stage's gradients; the stages of a node share its network."""
    device_class = context.classes[number]
    network, across_B = device_class.network, width_B > block_B
    inside_B = np.where(
        device_class.island % (block_B * tensor) == 0,
        device_class.joined.bandwidth,
        device_class.inside.bandwidth,
    )
    own_B: Array = 2 * (1 - 1 / width_B) * context.gradients
    own_B /= np.where(across_B, network.bandwidth, tensor * inside_B)
    ring_B: Array = np.where(across_B, _sum_latency(context, network, width_B), 0.0)
    run_B: Ints = np.where(across_B, device_class.each // tensor // block_B, 1)
    return own_B, ring_B, run_B


def _sum_latency(context: EstimateContext, network: Link, members: Ints | Array) -> Array:
    """Returns the latency [..] of sums among as many members on different nodes."""
    known, at = np.unique(members, return_inverse=True)
    steps = np.array([least_sum_steps(network, int(number)) for number in known])
    found: Array = steps[at] * np.float64(hop_latency(context.costs, network))
    return found


def _norm(context: EstimateContext, order: Sequence[int], devices_P: Array) -> Array:
    """Returns the seconds [P] of the norm over all devices, on the slowest network."""
    networks = [context.classes[number].network for number in dict.fromkeys(order)]
    found: Array = np.max([_sum_latency(context, each, devices_P) for each in networks], axis=0)
    return found


def _summed(prices: BuildPrices, build_P: Ints, depths_FP: Ints, depth_P: Ints) -> Array:
    """Seconds [P] of a stage's gradients; those of all stages of a node share its network."""
    worst_P: Array = np.zeros(len(build_P))
    for depths_P, (own_B, ring_B, run_B) in zip(depths_FP, prices.sums, strict=True):
        run_P = np.minimum(run_B[build_P], depths_P)
        np.maximum(worst_P, own_B[build_P] / depth_P * run_P + ring_B[build_P], out=worst_P)
    return worst_P


def _by_class(builds: Builds) -> Sequence[tuple[int, int, Ints, Ints]]:
    columns = builds.order, builds.tensors, builds.widths.T, builds.blocks.T
    return list(zip(*columns, strict=True))

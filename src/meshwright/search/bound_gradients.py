"""Bounds the step from below by the sums of gradients that must cross the network.

Letters: L layers, V nodes, M numbers of nodes, T kinds of nodes, K device types.

All rows of the batch pass a layer. Say that m nodes hold it. Its work can begin when a first row
has come through the layers before it, and takes at least the time that the m fastest nodes need for
it together. With m = 1 that is all. Otherwise each of the m nodes holds whole replicas, for tensor
groups stay inside nodes. A ring that sums a share of the gradients enters and leaves each of these
nodes and has m members or more, so that a node sends

    2 (m - 1) / m * bytes of the layer's gradients

in all its rings together, after the last backward of the layer on any node. So few nodes work long
on a layer, and many have a long sum after it. Of divided states, half of these bytes are gathered
weights, which are sent even later. A parameter that several layers share is summed after the
backward of the first of them; if that is the model's first layer, then after all that is computed
but gradients of weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Link
from meshwright.plan.ranks import gradient_bytes
from meshwright.search.bound_choices import Choices
from meshwright.search.costs import Array, Costs
from meshwright.search.space import usable_devices


@dataclass(frozen=True, slots=True)
class LayerSum:
    """Describes a sum of gradients that all holders of some layers take part in."""

    layers: tuple[int, ...]
    bytes: float


@dataclass(frozen=True, slots=True)
class NodeTables:
    """Holds what nodes can do for single layers."""

    sums: tuple[LayerSum, ...]
    before: Array
    """Least seconds [L + 1] of a row's forward through the layers before one."""
    behind: Array
    """Least seconds [L + 1] of its backward through them, without gradients of weights."""
    of_layer: NDArray[np.int64]
    """The kind [L] of each layer, by which the next three are indexed."""
    work: Array
    """Least seconds [., M] of all rows on the m fastest nodes for the layer."""
    early: Array
    """The same without gradients of weights."""
    alone: Array
    """Least seconds [., T] of all rows on one node of each kind."""
    rate: Array
    """Bytes per second [M] that the slowest of the m nodes with the best links can send."""
    devices: Array
    """How many devices [T, K] of each type a node has."""
    nodes: NDArray[np.int64]
    """How many nodes [T] of each kind there are."""


@dataclass(frozen=True, slots=True)
class LateSeconds:
    """Describes the last seconds before the norm, in which only nodes compute that hold a layer
    alone: one for each layer at most."""

    seconds: float
    layers: int
    devices: Array
    """How many devices [T, K] of each type a node has."""
    alone: NDArray[np.int64]
    """How many nodes [T] of each kind may hold a layer alone."""

    def idle(self, price_K: Array, sold: float) -> float:
        """Returns the least seconds that devices worth `sold` wait together, over their worth, at
        these prices of devices."""
        price_T, left, alone = self.devices @ price_K, self.layers, 0.0
        for t in np.argsort(-price_T):
            number = min(left, int(self.alone[t]))
            alone, left = alone + number * float(price_T[t]), left - number
        return self.seconds * max(0.0, 1 - alone / sold)


def node_tables(costs: Costs, kinds: Sequence[str], choices: Choices) -> NodeTables:
    """Prices the layers of a model on the nodes of a cluster."""
    batch = costs.job.global_batch
    there = np.isfinite(choices.work)
    ahead, back = (
        np.cumsum(np.where(there, each, np.inf).min(axis=1))
        for each in (choices.forward, choices.back)
    )
    speeds = np.concatenate(
        [_speeds(len(kinds), choices, each) for each in (choices.work, choices.early)], axis=1
    )
    kept, of_layer = np.unique(speeds, axis=0, return_inverse=True)
    work, early = kept[:, : len(kinds)], kept[:, len(kinds) :]
    usable = Counter((device.node, device.type) for device in usable_devices(costs))
    names = list(dict.fromkeys(node for node, _ in usable))
    every = np.array([[float(usable[name, kind]) for kind in kinds] for name in names])
    devices, nodes = np.unique(every, axis=0, return_counts=True)
    return NodeTables(
        sums=tuple(_sums(costs)),
        before=np.concatenate([[0.0], ahead]),
        behind=np.concatenate([[0.0], back]),
        of_layer=of_layer.reshape(-1),
        work=batch / _fastest(work, every),
        early=batch / _fastest(early, every),
        alone=batch / np.maximum(work @ devices.T, LEAST_SPEED),
        rate=np.sort(_rates(costs, names))[::-1],
        devices=devices,
        nodes=nodes,
    )


LEAST_SPEED = 1e-300
"""Rows per second that stand for none."""


def gradient_seconds(tables: NodeTables, early: float) -> float:
    """Returns the least seconds until gradients are summed, over all numbers of nodes that may hold
    a layer; of the layer for which that takes longest.

    `early` is a bound on steps in which no gradients of weights are computed.
    """
    number_M = np.arange(1.0, len(tables.rate) + 1)
    most = 0.0
    for each in tables.sums:
        first = each.layers[0]
        summed_M = sum_seconds(each.bytes, number_M, tables.rate)
        least_M = np.where((number_M > 1) & (first == 0), early + summed_M, 0.0)
        for layer in each.layers:
            work_M, early_M = (x[tables.of_layer[layer]] for x in (tables.work, tables.early))
            back = tables.behind[layer]
            for seconds_M in (
                work_M + summed_M,
                early_M + back - tables.behind[first] + summed_M,
                early_M + back,
            ):
                least_M = np.maximum(least_M, tables.before[layer] + seconds_M)
        most = max(most, float(least_M.min()))
    return most


def late_seconds(tables: NodeTables, within: float) -> LateSeconds:
    """Returns the time of the shortest sum of gradients, in steps that take less than `within`.

    After the last work on a layer that several nodes hold, its gradients are summed. In such a step
    a layer needs so many nodes, and only a node that is quick enough can hold it alone.
    """
    bytes_L, most = np.zeros(len(tables.of_layer)), len(tables.rate)
    for each in tables.sums:
        bytes_L[list(each.layers)] = np.maximum(bytes_L[list(each.layers)], each.bytes)
    left_L = within - tables.before[:-1]
    too_few = [
        np.searchsorted(-tables.work[kind], -left)
        for kind, left in zip(tables.of_layer, left_L, strict=True)
    ]
    number_L = np.maximum(2, 1 + np.array(too_few))
    rate_L = tables.rate[np.minimum(number_L, most) - 1]
    sums_L = np.where(number_L > most, np.inf, sum_seconds(bytes_L, number_L, rate_L))
    able_T = (tables.alone[tables.of_layer] <= left_L[:, None]).sum(axis=0)
    return LateSeconds(
        seconds=min(within, float(sums_L.min())),
        layers=len(bytes_L),
        devices=tables.devices,
        alone=np.minimum(tables.nodes, able_T),
    )


def sum_seconds(size: Array | float, number: Array, rate: Array) -> Array:
    """Returns the least seconds of the sum of so many bytes between numbers of nodes that send at
    some rate."""
    seconds: Array = 2 * (1 - 1 / number) * size / rate
    return seconds


def _sums(costs: Costs) -> Iterator[LayerSum]:
    """Yields the sums of the gradients of each layer, and of parameters that layers share."""
    width = gradient_bytes(costs.job) * min(1.0, costs.system.gradient_width)
    rounded = max(len(node.devices) for node in costs.cluster.nodes)  # each share, to a byte
    for number, layer in enumerate(costs.model.layers):
        yield LayerSum((number,), max(0.0, width * layer.parameters - rounded))
    for tied in costs.model.tied:
        yield LayerSum(tied.layers, max(0.0, width * tied.parameters - rounded))


def _rates(costs: Costs, names: Sequence[str]) -> list[float]:
    """Returns the bytes per second that each node can send while it receives as many."""
    links: dict[str, list[Link]] = defaultdict(list)
    for each in costs.cluster.direct:
        for name in each.between:
            links[name].append(each.link)
    rates = {}
    for node in costs.cluster.nodes:
        sent = sum(x.bandwidth / (1 + x.shared) for x in (node.network, *links[node.name]))
        bus = node.inside.bandwidth / 2 if node.inside.shared else np.inf
        rates[node.name] = min(sent, bus)
    return [rates[name] for name in names]


def _speeds(types: int, choices: Choices, work: Array) -> Array:
    """Returns the rows per second [L, K] that a device of each type works through."""
    speed = np.zeros((len(work), types))
    for k in range(types):
        own = np.where(np.isfinite(choices.work), work, np.inf)[:, choices.kind == k]
        speed[:, k] = 1 / np.maximum(own.min(axis=1, initial=np.inf), LEAST_SPEED)
    return speed


def _fastest(speed: Array, every: Array) -> Array:
    """Returns the rows per second [., M] that the m fastest of all nodes work through together."""
    together: Array = np.cumsum(np.sort(speed @ every.T, axis=1)[:, ::-1], axis=1)
    return np.maximum(together, LEAST_SPEED)

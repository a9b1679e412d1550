"""Bounds the step from below by the sums of gradients that must cross the network.

Letters: L layers, M numbers of nodes, V nodes.

All rows of the batch pass a layer. Say that m nodes hold it. Its work can begin when a first row
has come through the layers before it, and takes at least the time that the m fastest nodes need for
it together. With m = 1 that is all. Otherwise every one of the m nodes holds whole replicas, for
tensor groups stay inside nodes, and each ring that sums a share of the gradients enters and leaves
each of the nodes; with the m replicas or more that are its members, a node sends

    2 (m - 1) / m * bytes of the layer's gradients,

all of it after the last backward of the layer on any node. So few nodes work long on a layer, and
many have a long sum after it. With divided states half of it is the gathering of weights, which
comes even later. A parameter that several layers share is summed after the backward of the first of
these; if that is the first of the model, after every backward but for gradients of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cluster.spec import Node
from meshwright.plan.ranks import gradient_bytes
from meshwright.search.bound_choices import Choices
from meshwright.search.costs import Array, Costs
from meshwright.search.space import usable_devices


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum of gradients that all holders of some layers take part in."""

    layers: tuple[int, ...]
    bytes: float


def gradient_seconds(costs: Costs, kinds: Sequence[str], choices: Choices, early: float) -> float:
    """Least seconds of a step, over all numbers of nodes that may hold a layer, until its gradients
    are summed; of the layer for which that takes longest.

    `early` is a bound on the step in which no gradients of weights are computed.
    """
    sums = list(_sums(costs))
    if not sums:
        return 0.0
    rate_M = _slowest_rates(costs)
    number_M = np.arange(1.0, len(rate_M) + 1)
    batch = costs.job.global_batch
    work_LM, early_LM = (
        batch / _fastest_nodes(costs, kinds, choices, each)
        for each in (choices.work, choices.early)
    )
    ahead, back = (
        np.where(np.isfinite(choices.work), each, np.inf).min(axis=1)
        for each in (choices.forward, choices.back)
    )
    before = np.concatenate([[0.0], np.cumsum(ahead)])
    behind = np.concatenate([[0.0], np.cumsum(back)])
    most = 0.0
    for each in sums:
        first = each.layers[0]
        summed_M = 2 * (1 - 1 / number_M) * each.bytes / rate_M
        least_M = np.where((number_M > 1) & (first == 0), early + summed_M, 0.0)
        for layer in each.layers:
            way = behind[layer] - behind[first]
            for seconds_M in (
                work_LM[layer] + summed_M,
                early_LM[layer] + way + summed_M,
                early_LM[layer] + behind[layer],
            ):
                least_M = np.maximum(least_M, before[layer] + seconds_M)
        most = max(most, float(least_M.min()))
    return most


def _sums(costs: Costs) -> Iterator[_Sum]:
    """Yields the sums of the gradients of each layer, and of parameters that layers share."""
    width = gradient_bytes(costs.job) * min(1.0, costs.system.gradient_width)
    rounded = max(len(node.devices) for node in costs.cluster.nodes)  # each share, to a byte
    for number, layer in enumerate(costs.model.layers):
        yield _Sum((number,), max(0.0, width * layer.parameters - rounded))
    for tied in costs.model.tied:
        yield _Sum(tied.layers, max(0.0, width * tied.parameters - rounded))


def _slowest_rates(costs: Costs) -> Array:
    """Bytes per second [M] that the slowest of the m nodes with the best links can send."""
    return np.sort([_rate(costs, node) for node in _nodes(costs)])[::-1]


def _rate(costs: Costs, node: Node) -> float:
    """Bytes per second that a node can send while it receives as many."""
    links = [node.network, *(x.link for x in costs.cluster.direct if node.name in x.between)]
    sent = sum(link.bandwidth / (1 + link.shared) for link in links)
    return min(sent, node.inside.bandwidth / 2) if node.inside.shared else sent


def _nodes(costs: Costs) -> list[Node]:
    """The nodes with devices that can be used."""
    usable = {device.node for device in usable_devices(costs)}
    return [node for node in costs.cluster.nodes if node.name in usable]


def _fastest_nodes(costs: Costs, kinds: Sequence[str], choices: Choices, work: Array) -> Array:
    """Rows per second [L, M] that the m fastest nodes for a layer work through together."""
    speed = np.zeros((len(work), len(kinds)))
    for k in range(len(kinds)):
        own = np.where(np.isfinite(choices.work), work, np.inf)[:, choices.kind == k]
        speed[:, k] = 1 / own.min(axis=1, initial=np.inf)
    held = [Counter(node.devices) for node in _nodes(costs)]
    number = np.array([[each[kind] for kind in kinds] for each in held], dtype=np.float64)
    every: Array = np.sort(speed @ number.T, axis=1)[:, ::-1]
    return np.cumsum(every, axis=1)

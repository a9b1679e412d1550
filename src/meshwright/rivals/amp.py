"""Implements AMP's planner as published: strategies, cost model and layer assignment, on its own
inputs.

Li et al., "AMP: Automatically Finding Model Parallel Strategies with Heterogeneity Awareness",
NeurIPS 2022. It is faithful, oddities included, so that it repeats AMP's recorded predictions.
Meshwright's own planner is compared with it. Speeds are in words (32-bit numbers) per second, as in
the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

from meshwright.stopping import raise_if_stopped

Array = NDArray[np.float64]

ROUNDING = 1e-9
"""Share by which a bound may exceed what it bounds because seconds are added in another order."""


@dataclass(frozen=True, slots=True)
class AmpModel:
    """Describes a model as AMP sees it: as a list of entries, the layers of its pipeline and the
    no-ops among them."""

    forward_seconds: Mapping[int, tuple[float, ...]]
    """Seconds of every entry for one row, with the communication inside it, keyed by tensor
    width."""
    assigned: tuple[int, ...]
    """Entries that the layer assignment moves, ascending; those between go with the one before."""
    uniform: tuple[int, int, int]
    """Numbers of assigned entries: those that an even cut gives to the first stage in advance,
    those that it divides among all stages, and those that it adds to the last stage."""
    boundary_words: Mapping[int, tuple[float, ...]]
    """Words per row that cross a cut behind each assigned entry, keyed by tensor width."""
    parameter_words: tuple[float, ...]
    """Parameters of every entry, without embeddings."""
    embedding_words: float = 0.0
    """Parameters that count once for every stage that holds any of `embeddings`."""
    embeddings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AmpNode:
    """Holds the link speeds of one node, in words per second."""

    network: float
    inside: float


@dataclass(frozen=True, slots=True)
class AmpCluster:
    """Describes nodes with equally many devices; ranks are numbered node by node."""

    devices_per_node: int
    nodes: tuple[AmpNode, ...]


@dataclass(frozen=True, slots=True)
class Strategy:
    """Describes one strategy of AMP's space. Rank = tensor index + tp * (replica + dp * stage)."""

    tensor: int
    data: int
    stages: int
    micro_batch: int
    """Rows per micro-batch and replica."""


@dataclass(frozen=True, slots=True)
class AmpPrediction:
    """Holds AMP's answer for one strategy."""

    strategy: Strategy
    micro_batches: int
    bounds: tuple[int, ...]
    """Entry at which every stage begins, then the number of entries."""
    seconds: float


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def strategies(cluster: AmpCluster, global_batch: int) -> tuple[Strategy, ...]:
    """Returns AMP's space in its own order: by micro-batch, then tensor width, then data width."""
    devices = cluster.devices_per_node * len(cluster.nodes)
    found = [
        Strategy(tensor=t, data=d, stages=devices // t // d, micro_batch=m)
        for t in divisors(cluster.devices_per_node)
        for d in divisors(devices // t)
        if global_batch % d == 0
        for m in divisors(global_batch // d)
    ]
    return tuple(sorted(found, key=lambda s: s.micro_batch))


def _link(cluster: AmpCluster, one: int, other: int) -> float:
    a, b = one // cluster.devices_per_node, other // cluster.devices_per_node
    if a == b:
        return cluster.nodes[a].inside
    return min(cluster.nodes[a].network, cluster.nodes[b].network)


def boundary_seconds(model: AmpModel, cluster: AmpCluster, strategy: Strategy) -> Array:
    """Returns the seconds [assigned entry - 1, stage - 1] of a cut behind an entry: its words over
    the slowest link between corresponding tensor ranks, averaged over the replicas."""
    width = strategy.tensor * strategy.data
    words = strategy.micro_batch * np.array(model.boundary_words[strategy.tensor][:-1])
    inverse = np.zeros(strategy.stages - 1)
    for stage in range(strategy.stages - 1):
        first = stage * width
        slowest = [
            min(_link(cluster, rank, rank + width) for rank in range(r, r + strategy.tensor))
            for r in range(first, first + width, strategy.tensor)
        ]
        inverse[stage] = np.mean([1 / speed for speed in slowest])
    return words[:, None] * inverse


def assign_faithfully(
    times: Array, cuts: Array, stages: int, micro_batches: int
) -> tuple[int, ...]:
    """Returns the number of layers of every stage, by AMP's own dynamic program.

    f(i, j, m) = least of (B - 1) * max(0, slowest stage - m) + boundary seconds over the ways to
    cut layers 0..i into j + 1 stages when a later stage already takes m. Two oddities are part of
    it. The boundary seconds of a cut count when it is compared with the best cut so far, but are
    left out of the value that is kept, which later cuts have to beat. The first of equals wins. The
    table is filled for all i and m at once, but for those m that the layers after i cannot take.
    """
    layers, weight = len(times), micro_batches - 1
    sums = np.full((layers, layers), np.inf)
    for first in range(layers):
        sums[first, first:] = np.cumsum(times[first:])
    marks = np.unique(np.append(sums[np.isfinite(sums)], 0.0))
    index = np.searchsorted(marks, sums)
    excess = np.maximum(0.0, marks[:, None] - marks) * weight
    best = np.full((stages, layers, len(marks)), np.inf)
    best[0] = excess[index[0]]
    chosen = np.zeros(best.shape, dtype=np.int32)
    columns = np.arange(len(marks))
    most = [*np.maximum.accumulate(index[:0:-1, -1])[-2::-1], 0]  # by cut, of the rows after it
    for cut in range(layers - 1):
        raise_if_stopped()
        last = index[cut + 1, cut + 1 :]
        slowest = np.maximum(last[:, None], columns[: most[cut] + 1])
        more = excess[last, : most[cut] + 1]
        for stage in range(max(1, cut + 1 + stages - layers), min(stages, cut + 2)):
            ahead = stage < stages - 1
            # Later stages need a layer each; the last one ends the whole chain, with nothing after.
            rows = slice(0, layers - (stages - 1 - stage) - cut - 1) if ahead else slice(-1, None)
            width = most[cut] + 1 if ahead else 1
            value = best[stage - 1, cut].take(slowest[rows, :width]) + more[rows, :width]
            value += cuts[cut, stage - 1]
            found = best[stage, cut + 1 :][rows, :width]
            better = value < found
            if better.any():
                np.copyto(found, value - cuts[cut, stage - 1], where=better)
                np.copyto(chosen[stage, cut + 1 :][rows, :width], cut, where=better)
    return _sizes(chosen, index)


def _sizes(chosen: NDArray[np.int32], index: NDArray[np.intp]) -> tuple[int, ...]:
    last, mark = chosen.shape[1] - 1, 0
    sizes = []
    for stage in range(chosen.shape[0] - 1, 0, -1):
        cut = int(chosen[stage, last, mark])
        mark = max(mark, int(index[cut + 1, last]))
        sizes.append(last - cut)
        last = cut
    return (*reversed([*sizes, last + 1]),)


def _uniform(model: AmpModel, stages: int) -> tuple[int, ...]:
    first, shared, last = model.uniform
    sizes = [shared // stages + (stage < shared % stages) for stage in range(stages)]
    sizes[0] += first
    sizes[-1] += last
    return tuple(sizes)


def pipeline_seconds(
    times: Array, cuts: Array, sizes: tuple[int, ...], micro_batches: int
) -> float:
    """Computes (B - 1) * slowest stage + all layers + boundary seconds at the cuts."""
    ends = np.cumsum(sizes)
    slowest = max(
        float(times[end - size : end].sum()) for end, size in zip(ends, sizes, strict=True)
    )
    crossing = sum(float(cuts[end - 1, stage]) for stage, end in enumerate(ends[:-1]))
    return (micro_batches - 1) * slowest + float(times.sum()) + crossing


def _entry_bounds(model: AmpModel, sizes: tuple[int, ...]) -> tuple[int, ...]:
    ends = [model.assigned[end - 1] + 1 for end in np.cumsum(sizes)]
    return (0, *ends[:-1], len(model.parameter_words))


def data_seconds(
    model: AmpModel, cluster: AmpCluster, strategy: Strategy, bounds: tuple[int, ...]
) -> float:
    """Returns the seconds of the gradient reduction of the slowest stage and tensor rank.

    seconds = 2 (dp - 1) / dp * words / speed

    As in the published code, the speed is that of the pair which closes the ring, not that of its
    slowest pair.
    """
    tensor, data = strategy.tensor, strategy.data
    worst = 0.0
    for stage in range(strategy.stages):
        first, last = bounds[stage], bounds[stage + 1]
        words = sum(model.parameter_words[first:last])
        if any(first <= entry < last for entry in model.embeddings):
            words += model.embedding_words
        begin = stage * data * tensor
        end = begin + (data - 1) * tensor
        speed = min(_link(cluster, end + t, begin + t) for t in range(tensor))
        worst = max(worst, 2 * (data - 1) / data * words / tensor / speed)
    return worst


def _layer_seconds(model: AmpModel, strategy: Strategy) -> Array:
    """Returns the seconds of every assigned entry for a micro-batch: three times its forward."""
    times = 3 * strategy.micro_batch * np.array(model.forward_seconds[strategy.tensor])
    return times[list(model.assigned)]


def predict(
    model: AmpModel, cluster: AmpCluster, strategy: Strategy, global_batch: int
) -> AmpPrediction:
    """Returns AMP's assignment and step seconds for one strategy."""
    raise_if_stopped()
    times = _layer_seconds(model, strategy)
    micro_batches = global_batch // strategy.data // strategy.micro_batch
    cuts = boundary_seconds(model, cluster, strategy)
    if micro_batches == 1:
        sizes = _uniform(model, strategy.stages)
    else:
        sizes = assign_faithfully(times, cuts, strategy.stages, micro_batches)
    bounds = _entry_bounds(model, sizes)
    return AmpPrediction(
        strategy=strategy,
        micro_batches=micro_batches,
        bounds=bounds,
        seconds=pipeline_seconds(times, cuts, sizes, micro_batches)
        + data_seconds(model, cluster, strategy, bounds),
    )


def space(model: AmpModel, cluster: AmpCluster, global_batch: int) -> list[Strategy]:
    """Returns AMP's strategies, without those that have more stages than layers, which its tables
    do not cover, or a tensor width without times."""
    shared = model.uniform[1]
    return [
        strategy
        for strategy in strategies(cluster, global_batch)
        if strategy.stages <= shared and strategy.tensor in model.forward_seconds
    ]


def rank(model: AmpModel, cluster: AmpCluster, global_batch: int) -> tuple[AmpPrediction, ...]:
    """Returns the strategies of AMP's space, best first."""
    every = space(model, cluster, global_batch)
    return tuple(ranked(model, cluster, global_batch, every))


def ranked(
    model: AmpModel, cluster: AmpCluster, global_batch: int, chosen: Sequence[Strategy]
) -> Iterator[AmpPrediction]:
    """Yields some strategies, best first; each is predicted when no other has a lesser bound."""
    queue: list[tuple[float, int, AmpPrediction | None]] = [
        (_least_seconds(model, strategy, global_batch), number, None)
        for number, strategy in enumerate(chosen)
    ]
    heapify(queue)
    while queue:
        _, number, known = queue[0]
        if known is not None:
            heappop(queue)
            yield known
        else:
            found = predict(model, cluster, chosen[number], global_batch)
            heapreplace(queue, (found.seconds, number, found))


def _least_seconds(model: AmpModel, strategy: Strategy, global_batch: int) -> float:
    """Returns a bound of what `predict` finds: equal stages, or the slowest layer alone, and
    nothing but compute."""
    times = _layer_seconds(model, strategy)
    slowest = max(float(times.max()), float(times.sum()) / strategy.stages)
    further = global_batch // strategy.data // strategy.micro_batch - 1
    return (1 - ROUNDING) * (further * slowest + float(times.sum()))

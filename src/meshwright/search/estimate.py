"""Estimates the step of a regular grid in closed form, and finds its best layer cuts.

Letters: S stages, L layers, M micro-batches, a stage's first layer, b one past its last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.topology import Resource, path
from meshwright.cost.collective import Traffic, concurrent, uncontended_seconds
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.links import overhead_seconds
from meshwright.cost.weights import stage_parameters
from meshwright.search.costs import (
    PROBE_BYTES,
    Array,
    Costs,
    TensorGroup,
    reduced_bytes,
    reduced_width,
    remembered,
    ring,
    scaled,
    seconds_per_byte,
    stage_times,
)
from meshwright.search.grid_memory import (
    Memory,
    fitting_loads,
    least_excess,
    memory_of,
    recomputed_stages,
    stage_excess,
)
from meshwright.search.layer_partition import assign, can_hold, least_worst
from meshwright.search.placement import Placement
from meshwright.search.space import DeviceSet, Shape
from meshwright.techniques.activation_checkpointing.price import repeated_seconds

Bounds = tuple[int, ...]
Stage = tuple[TensorGroup, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Describes a strategy of which everything is decided but its layer cuts."""

    used: DeviceSet
    placement: Placement
    shape: Shape
    fixed: Bounds | None = None
    """Cuts that are given, not searched: hand-made plans."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates one step in closed form, part by part, in seconds."""

    candidate: Candidate
    bounds: Bounds
    seconds: float


@dataclass(frozen=True, slots=True)
class Misfit:
    """Says by how much a candidate exceeds memory with the cuts that exceed it least."""

    candidate: Candidate
    bounds: Bounds
    excess_bytes: float
    """On each device of the worst stage."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Holds the stages of a candidate as arrays of seconds and bytes, from which layers are
    assigned."""

    forward: Array
    backward: Array
    forward_cut: Array
    """Seconds [S - 1, L + 1] of the activations across a cut before each layer."""
    backward_cut: Array
    memory: Memory


def optimistic_seconds(costs: Costs, candidate: Candidate) -> float:
    """Returns seconds that no cut can beat: M - 1 perfectly balanced rounds, and every layer once
    where it is fastest.

        slowest stage >= 1 / sum over stages of 1 / (whole model on that stage)
    """
    times = _times(costs, candidate)
    whole = np.array([t.sum() for t in times])
    balanced = 1 / (1 / whole).sum()
    once = np.min(times, axis=0)
    slowest = max(balanced, float(once.max()))
    return float((candidate.shape.micro_batches - 1) * slowest + once.sum())


def _times(costs: Costs, candidate: Candidate) -> list[Array]:
    found = []
    for stage in candidate.placement.stages:
        forward, backward = stage_times(costs, stage, candidate.shape.rows)
        found.append(forward + backward)
    return found


def chain(costs: Costs, candidate: Candidate) -> Chain:
    """Collects the seconds and bytes from which the assignment of layers is found."""
    shape, stages = candidate.shape, candidate.placement.stages
    times = [stage_times(costs, stage, shape.rows) for stage in stages]
    return Chain(
        forward=np.array([forward for forward, _ in times]),
        backward=np.array([backward for _, backward in times]),
        forward_cut=_cuts(costs, candidate, costs.table.cut, forward=True),
        backward_cut=_cuts(costs, candidate, costs.table.cut_gradient, forward=False),
        memory=memory_of(costs, candidate.placement, shape),
    )


def _cuts(costs: Costs, candidate: Candidate, row_bytes: Array, *, forward: bool) -> Array:
    stages = candidate.placement.stages
    found = np.zeros((len(stages) - 1, len(row_bytes)))
    for s, (here, there) in enumerate(pairwise(stages)):
        ways = (here, there) if forward else (there, here)
        price = partial(_transfer_price, costs, *ways)
        latency, slope = remembered(costs, ("transfers", *ways), price)
        sizes = row_bytes * candidate.shape.rows
        found[s] = np.where(sizes > 0, latency + slope * sizes, 0.0)
    return found


def _transfer_price(costs: Costs, source: Stage, target: Stage) -> tuple[float, float]:
    """Returns the latency, and seconds for each byte of a replica, of all transfers of a stage."""
    uses: Counter[Resource] = Counter()
    latency = 0.0
    for one, other in zip(source, target, strict=True):
        for a, b in zip(one, other, strict=True):
            way = path(costs.links, a, b)
            uses.update(way.resources)
            latency = max(latency, way.latency + costs.system.boundary if a != b else 0.0)
    sizes = {resource: float(number * PROBE_BYTES) for resource, number in uses.items()}
    return seconds_per_byte(costs, [Traffic(bytes_by_resource=sizes, latency=latency)])


def evaluate(costs: Costs, candidate: Candidate) -> Estimate | Misfit:
    """Finds the best cuts that fit, and the step's seconds in closed form; else by how much memory
    the candidate misses."""
    if candidate.fixed is not None:
        return _given(costs, candidate, candidate.fixed)
    shape, placement = candidate.shape, candidate.placement
    memory = memory_of(costs, placement, shape)
    loads = fitting_loads(costs, placement, shape, memory)
    if not can_hold(loads):
        return Misfit(candidate, *least_excess(costs, shape, memory))
    facts = chain(costs, candidate)
    found = assign(loads, facts.forward_cut + facts.backward_cut, shape.micro_batches)
    assert found is not None, "some layers fit on every stage"
    as_slow = found.slowest * (1 + 1e-9)  # sums of equal layers differ in their last bit
    parameter_seconds = [
        np.where(own <= as_slow, seconds, np.inf)
        for own, seconds in zip(loads, _parameter_seconds(costs, candidate), strict=True)
    ]
    lightest = least_worst(parameter_seconds)
    assert lightest is not None, "the cuts found are among them"
    return min(
        (
            Estimate(candidate, bounds, step_seconds(costs, candidate, bounds, facts))
            for bounds in dict.fromkeys((found.bounds, lightest[0]))
        ),
        key=lambda estimate: estimate.seconds,
    )


def _repeated(costs: Costs, facts: Chain) -> Array:
    """Returns the seconds [S, L] that recomputation adds to each layer's backward."""
    whole = (0, facts.forward.shape[1])
    return np.array([repeated_seconds(costs.model, whole, each) for each in facts.forward])


def _parameter_seconds(costs: Costs, candidate: Candidate) -> Iterator[Array]:
    """Yields for each stage the seconds [L + 1, L + 1] that its parameters cost after the pipeline:
    their reduction alone on the links, and the optimizer. The assignment does not see them; of the
    cuts with its bottleneck, those with the smallest tail are the other ones worth a look."""
    tensor = candidate.shape.grid.tensor
    held = remembered(costs, ("parameters held", tensor), lambda: _parameters_held(costs, tensor))
    for s, stage in enumerate(candidate.placement.stages):
        price = partial(_ring_price, costs, candidate, s)
        slope = remembered(costs, ("reduced", stage), price)
        yield held * (slope * reduced_width(costs) + _optimizer(costs, candidate, s, 1))


def _ring_price(costs: Costs, candidate: Candidate, s: int) -> float:
    """Returns the seconds for each byte of a stage's gradients."""
    return seconds_per_byte(costs, _rings(costs, candidate, (s,)))[1]


def _parameters_held(costs: Costs, tensor: int) -> Array:
    """Returns the parameters [L + 1, L + 1] on each tensor rank of a stage."""
    size = len(costs.model.layers) + 1
    first, last = np.triu_indices(size, k=1)
    held = np.zeros((size, size))
    held[first, last] = stage_parameters(costs.table.weights, (first, last), tensor)
    return held


def _given(costs: Costs, candidate: Candidate, bounds: Bounds) -> Estimate | Misfit:
    memory = memory_of(costs, candidate.placement, candidate.shape)
    excess = max(
        stage_excess((memory.recomputed if recompute else None) or memory.plain, memory, s, layers)
        for s, (layers, recompute) in enumerate(
            zip(pairwise(bounds), recomputed_stages(memory, bounds), strict=True)
        )
    )
    if excess > 0:
        return Misfit(candidate, bounds, excess)
    return Estimate(candidate, bounds, given_seconds(costs, candidate))


def given_seconds(costs: Costs, candidate: Candidate) -> float:
    """Returns the step seconds of a candidate whose cuts are given, whether it fits or not."""
    assert candidate.fixed is not None
    return step_seconds(costs, candidate, candidate.fixed, chain(costs, candidate))


def step_seconds(costs: Costs, candidate: Candidate, bounds: Bounds, facts: Chain) -> float:
    """Returns the seconds of one step.

        stages and boundaries once + further micro-batches
            + exposed reduction + optimizer + overhead

    A reduction begins inside its stage's last backward; what outlasts the backwards of the stages
    before it is exposed.
    """
    shape, ranges = candidate.shape, tuple(pairwise(bounds))
    forward = np.array([facts.forward[s, a:b].sum() for s, (a, b) in enumerate(ranges)])
    backward = np.array([facts.backward[s, a:b].sum() for s, (a, b) in enumerate(ranges)])
    recomputed = recomputed_stages(facts.memory, bounds)
    if any(recomputed):
        repeated = _repeated(costs, facts)
        backward += [
            repeated[s, a:b].sum() if recompute else 0.0
            for s, ((a, b), recompute) in enumerate(zip(ranges, recomputed, strict=True))
        ]
    ahead, back = np.zeros(len(ranges)), np.zeros(len(ranges))
    for s, cut in enumerate(bounds[1:-1]):
        ahead[s], back[s] = facts.forward_cut[s, cut], facts.backward_cut[s, cut]
    returns = costs.table.cut_returns[list(bounds[1:-1])] > 0
    further = _further(shape, forward, backward, ahead, back, returns)
    once = float((forward + backward + ahead + back).sum())
    before = np.concatenate([[0.0], np.cumsum(backward + back)[:-1]])
    reduce = _reductions(costs, candidate, ranges)
    hides = backward * (1 - costs.system.reduction_delay)
    lasts = np.maximum(reduce[:, 0] - hides, reduce[:, 1])
    exposed = max(0.0, float((lasts - before).max()))
    tensor = shape.grid.tensor
    optimizer = max(
        _optimizer(
            costs, candidate, s, float(stage_parameters(costs.table.weights, layers, tensor))
        )
        for s, layers in enumerate(ranges)
    )
    overhead = overhead_seconds(costs.profile)
    return once + further + exposed + optimizer + overhead


def _further(
    shape: Shape,
    forward: Array,
    backward: Array,
    ahead: Array,
    back: Array,
    returns: NDArray[np.bool_],
) -> float:
    """Returns the seconds that the micro-batches after the first one add.

    GPipe: M - 1 times the slowest forward or transfer, and the slowest backward or transfer. 1F1B:
    M - 1 times the slowest stage or transfer; or, at a stage that may hold d < M micro-batches, its
    round trip to the last stage and back for every further d of them, unless nothing comes back.
    """
    count = shape.micro_batches - 1
    if shape.schedule == "gpipe":
        return count * float(max(forward.max(), ahead.max()) + max(backward.max(), back.max()))
    loads = forward + backward
    depth = np.minimum(np.arange(len(loads), 0, -1), shape.micro_batches)
    trips = np.cumsum((loads + ahead + back)[::-1])[::-1]
    waits = trips * (shape.micro_batches / depth - 1)
    if not returns.all():
        waits[: 1 + int(np.flatnonzero(~returns)[-1])] = 0.0
    return max(count * float(max(loads.max(), ahead.max(), back.max())), float(waits.max()))


def _optimizer(costs: Costs, candidate: Candidate, s: int, parameters: float) -> float:
    return max(
        optimizer_seconds(
            costs.cluster.types[kind],
            costs.job.optimizer,
            parameters,
            costs.profile,
            costs.model.precision,
        )
        for kind in candidate.placement.types[s]
    )


def _reductions(costs: Costs, candidate: Candidate, ranges: tuple[tuple[int, int], ...]) -> Array:
    """Returns the seconds [S, 2] in which each stage's gradients are summed: all, and the last."""
    found = np.zeros((len(ranges), 2))
    sizes = np.zeros((len(ranges), 2))
    rings: list[tuple[set[int], Traffic]] = []
    for s, layers in enumerate(ranges):
        if own := _rings(costs, candidate, (s,)):
            tensor = candidate.shape.grid.tensor
            sizes[s] = reduced_bytes(costs, layers, tensor)
            rings += [({s}, scaled(t, sizes[s, 0])) for t in own]
    for tied in costs.model.tied:
        holders = tuple(
            s for s, (a, b) in enumerate(ranges) if any(a <= layer < b for layer in tied.layers)
        )
        share = candidate.shape.grid.tensor if "tensor" in tied.divided else 1
        size = tied.parameters / share * reduced_width(costs)
        if between := _rings(costs, candidate, holders):
            sizes[list(holders)] += size
            rings += [(set(holders), scaled(t, size)) for t in between]
    everything = concurrent(traffic for _, traffic in rings).bytes_by_resource
    for s in range(len(ranges)):
        if sizes[s, 0] > 0:
            mine = concurrent(traffic for holders, traffic in rings if s in holders)
            busy = {name: everything[name] for name in mine.bytes_by_resource}
            found[s, 0] = uncontended_seconds(
                costs.links, Traffic(bytes_by_resource=busy, latency=mine.latency)
            )
            found[s, 1] = found[s, 0] * sizes[s, 1] / sizes[s, 0]
    return found


def _rings(costs: Costs, candidate: Candidate, stages: tuple[int, ...]) -> list[Traffic]:
    """Returns one ring for each tensor index, over all replicas of these stages."""
    groups = [group for s in stages for group in candidate.placement.stages[s]]
    if len(groups) < 2:
        return []
    return [ring(costs, tuple(members)) for members in zip(*groups, strict=True)]

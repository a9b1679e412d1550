"""Estimates the step of a regular grid in closed form, and finds its best layer cuts.

Letters: S stages, L layers, M micro-batches, a stage's first layer, b one past its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collective import Traffic, concurrent, uncontended_seconds
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.links import overhead_seconds
from meshwright.cost.weights import stage_parameters
from meshwright.program.schedules import in_flight
from meshwright.search.costs import (
    PROBE_BYTES,
    Array,
    Costs,
    capacities,
    pair,
    reduced_bytes,
    reduced_width,
    ring,
    scaled,
    seconds_per_byte,
    stage_bytes,
    stage_times,
)
from meshwright.search.layer_partition import assign, chain_loads, forbid_beyond, least_worst
from meshwright.search.placement import Placement
from meshwright.search.space import DeviceSet, Shape
from meshwright.techniques.activation_checkpointing.price import repeated_seconds

Bounds = tuple[int, ...]


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
class Needs:
    """Holds the bytes [L + 1, L + 1] that each device of a stage with layers [a, b) must have."""

    always: Array
    each: Array
    """Bytes for every micro-batch in flight."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Holds the bytes that the stages of a candidate need, and those that their devices have."""

    plain: Needs
    """Needs of stages that keep the activations of their layers."""
    recomputed: Needs | None
    """Needs of stages that recompute; None if they may not."""
    held: Array
    """Micro-batches in flight [S]."""
    capacity: Array
    """Bytes [S]."""


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
        memory=memory_of(costs, candidate),
    )


def memory_of(costs: Costs, candidate: Candidate) -> Memory:
    """Returns what decides what fits where: the bytes of layers on every stage, and capacities."""
    shape, stages = candidate.shape, len(candidate.placement.stages)
    tensor, rows = shape.grid.tensor, shape.rows
    return Memory(
        plain=Needs(*stage_bytes(costs, tensor, rows)),
        recomputed=Needs(*stage_bytes(costs, tensor, rows, recompute=True))
        if costs.recomputed
        else None,
        held=np.array(
            [in_flight(shape.schedule, s, stages, shape.micro_batches) for s in range(stages)]
        ),
        capacity=capacities(costs, candidate.placement.types),
    )


def _cuts(costs: Costs, candidate: Candidate, row_bytes: Array, *, forward: bool) -> Array:
    stages = candidate.placement.stages
    found = np.zeros((len(stages) - 1, len(row_bytes)))
    for s, (here, there) in enumerate(pairwise(stages)):
        ends = [
            (a, b) if forward else (b, a)
            for one, other in zip(here, there, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        latency, slope = seconds_per_byte(costs, _transfers(costs, ends))
        sizes = row_bytes * candidate.shape.rows
        found[s] = np.where(sizes > 0, latency + slope * sizes, 0.0)
    return found


def _transfers(costs: Costs, ends: Iterable[tuple[str, str]]) -> Iterator[Traffic]:
    """Yields the transfers between pairs of devices, those between the same nodes as one."""
    alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for a, b in ends:
        here, there = costs.devices[a].node, costs.devices[b].node
        alike.setdefault((a, b) if here == there else (here, there), []).append((a, b))
    for pairs in alike.values():
        yield scaled(pair(costs, *pairs[0]), len(pairs) * PROBE_BYTES)


def evaluate(costs: Costs, candidate: Candidate) -> Estimate | Misfit:
    """Finds the best cuts that fit, and the step's seconds in closed form; else by how much memory
    the candidate misses."""
    if candidate.fixed is not None:
        return _given(costs, candidate, candidate.fixed)
    facts = chain(costs, candidate)
    loads, memory = chain_loads(facts.forward + facts.backward), facts.memory
    need = _bytes(memory.plain, memory)
    fitting = forbid_beyond(loads, need, memory.capacity)
    if memory.recomputed and not np.array_equal(fitting, loads):
        need = _bytes(memory.recomputed, memory)
        repeated = forbid_beyond(chain_loads(_repeated(costs, facts)), need, memory.capacity)
        fitting = np.where(np.isfinite(fitting), fitting, loads + repeated)
    cuts = facts.forward_cut + facts.backward_cut
    found = assign(fitting, cuts, candidate.shape.micro_batches)
    if found is None:
        excess = np.where(np.isfinite(loads), need - memory.capacity[:, None, None], np.inf)
        least = least_worst(excess)
        assert least is not None, "grids have no more stages than layers"
        return Misfit(candidate, least[0], least[1])
    as_slow = found.slowest * (1 + 1e-9)  # sums of equal layers differ in their last bit
    parameter_seconds = np.where(fitting <= as_slow, _parameter_seconds(costs, candidate), np.inf)
    lightest = least_worst(parameter_seconds)
    assert lightest is not None, "the cuts found are among them"
    return min(
        (
            Estimate(candidate, bounds, step_seconds(costs, candidate, bounds, facts))
            for bounds in (found.bounds, lightest[0])
        ),
        key=lambda estimate: estimate.seconds,
    )


def _bytes(needs: Needs, memory: Memory) -> Array:
    """Returns the bytes [S, L + 1, L + 1] of every stage."""
    found: Array = needs.always + needs.each * memory.held[:, None, None]
    return found


def _repeated(costs: Costs, facts: Chain) -> Array:
    """Returns the seconds [S, L] that recomputation adds to each layer's backward."""
    whole = (0, facts.forward.shape[1])
    return np.array([repeated_seconds(costs.model, whole, each) for each in facts.forward])


def recomputed_stages(memory: Memory, bounds: Bounds) -> tuple[bool, ...]:
    """Returns the stages that do not fit otherwise, if they may recompute."""
    if memory.recomputed is None:
        return (False,) * (len(bounds) - 1)
    return tuple(
        _excess(memory.plain, memory, s, layers) > 0 for s, layers in enumerate(pairwise(bounds))
    )


def _excess(needs: Needs, memory: Memory, s: int, layers: tuple[int, int]) -> float:
    a, b = layers
    need = needs.always[a, b] + needs.each[a, b] * memory.held[s]
    return float(need - memory.capacity[s])


def _parameter_seconds(costs: Costs, candidate: Candidate) -> Array:
    """Returns the seconds [S, L + 1, L + 1] that a stage's parameters cost after the pipeline:
    their reduction alone on the links, and the optimizer. The assignment does not see them; of the
    cuts with its bottleneck, those with the smallest tail are the other ones worth a look."""
    tensor, size = candidate.shape.grid.tensor, len(costs.model.layers) + 1
    first, last = np.triu_indices(size, k=1)
    held = np.zeros((size, size))
    held[first, last] = stage_parameters(costs.table.weights, (first, last), tensor)
    per_parameter = []
    for s in range(len(candidate.placement.stages)):
        _, slope = seconds_per_byte(costs, _rings(costs, candidate, (s,)))
        per_parameter.append(slope * reduced_width(costs) + _optimizer(costs, candidate, s, 1))
    parameter_seconds: Array = held * np.array(per_parameter)[:, None, None]
    return parameter_seconds


def _given(costs: Costs, candidate: Candidate, bounds: Bounds) -> Estimate | Misfit:
    memory = memory_of(costs, candidate)
    excess = max(
        _excess((memory.recomputed if recompute else None) or memory.plain, memory, s, layers)
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

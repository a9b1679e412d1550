"""Weighs the stages of a regular grid: which layers fit where, and which stages must recompute.

Letters: S stages, L layers; a stage has the layers [a, b).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from meshwright.program.schedules import in_flight
from meshwright.search.costs import (
    Array,
    Costs,
    capacities,
    distinct_groups,
    group_kind,
    remembered,
    stage_bytes,
    stage_times,
)
from meshwright.search.layer_partition import chain_loads, least_worst
from meshwright.search.placement import Placement
from meshwright.search.space import Shape
from meshwright.techniques.activation_checkpointing.price import repeated_seconds


@dataclass(frozen=True, slots=True)
class Needs:
    """Holds the bytes [L + 1, L + 1] that each device of a stage with layers [a, b) must have."""

    always: Array
    each: Array
    """Bytes for every micro-batch in flight."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Holds the bytes that the stages of a grid need, and those that their devices have."""

    plain: Needs
    """Needs of stages that keep the activations of their layers."""
    recomputed: Needs | None
    """Needs of stages that recompute; None if they may not."""
    held: tuple[int, ...]
    """Micro-batches in flight [S]."""
    capacity: tuple[float, ...]
    """Bytes [S]."""


def memory_of(costs: Costs, placement: Placement, shape: Shape) -> Memory:
    """Returns the bytes of layers on every stage and the capacities, which decide what fits
    where."""
    stages = len(placement.stages)
    tensor, rows = shape.grid.tensor, shape.rows
    again = stage_bytes(costs, tensor, rows, recompute=True) if costs.recomputed else None
    return Memory(
        plain=Needs(*stage_bytes(costs, tensor, rows)),
        recomputed=Needs(*again) if again else None,
        held=tuple(
            in_flight(shape.schedule, s, stages, shape.micro_batches) for s in range(stages)
        ),
        capacity=tuple(capacities(costs, placement.types).tolist()),
    )


def stage_excess(needs: Needs, memory: Memory, s: int, layers: tuple[int, int]) -> float:
    """Returns the bytes by which a stage with these layers exceeds its devices."""
    need = needs.always[layers] + needs.each[layers] * memory.held[s]
    return float(need - memory.capacity[s])


def recomputed_stages(memory: Memory, bounds: tuple[int, ...]) -> tuple[bool, ...]:
    """Returns the stages that do not fit otherwise, if they may recompute."""
    if memory.recomputed is None:
        return (False,) * (len(bounds) - 1)
    return tuple(
        stage_excess(memory.plain, memory, s, layers) > 0
        for s, layers in enumerate(pairwise(bounds))
    )


def fitting_loads(costs: Costs, placement: Placement, shape: Shape, memory: Memory) -> list[Array]:
    """Returns for every stage the seconds [L + 1, L + 1] of the layers that fit, recomputed where
    they do not fit otherwise; infinite where they do not fit even then. Stages that are alike share
    an array."""
    found = []
    for s, stage in enumerate(placement.stages):
        kinds = frozenset(group_kind(costs, group) for group in distinct_groups(costs, stage))
        key = ("fitting loads", kinds, shape.rows, memory.held[s], memory.capacity[s])
        times = stage_times(costs, stage, shape.rows)
        found.append(remembered(costs, key, partial(_fitting, costs, times, memory, s)))
    return found


def _fitting(costs: Costs, times: tuple[Array, Array], memory: Memory, s: int) -> Array:
    forward, backward = times
    loads: Array = chain_loads((forward + backward)[None])[0]
    plain = _within(loads, memory.plain, memory, s)
    if memory.recomputed is None or np.array_equal(plain, loads):
        return plain
    repeated = repeated_seconds(costs.model, (0, len(forward)), forward)
    again = _within(chain_loads(repeated[None])[0], memory.recomputed, memory, s)
    return np.where(np.isfinite(plain), plain, loads + again)


def _within(loads: Array, needs: Needs, memory: Memory, s: int) -> Array:
    """Returns the loads that forbid every range that needs more than the stage's bytes."""
    needed = needs.always + needs.each * memory.held[s]
    return np.where(needed <= memory.capacity[s], loads, np.inf)


def least_excess(costs: Costs, shape: Shape, memory: Memory) -> tuple[tuple[int, ...], float]:
    """Returns the cuts that exceed memory least, and by how many bytes on the worst stage."""
    key = ("least excess", shape.grid.tensor, shape.rows, memory.held, memory.capacity)
    return remembered(costs, key, lambda: _least_excess(memory))


def _least_excess(memory: Memory) -> tuple[tuple[int, ...], float]:
    needs = memory.recomputed or memory.plain
    empty = np.tri(len(needs.always), dtype=bool)
    every: dict[tuple[int, float], Array] = {}
    for held, capacity in zip(memory.held, memory.capacity, strict=True):
        if (held, capacity) not in every:
            excess = needs.always + needs.each * held - capacity
            every[held, capacity] = np.where(empty, np.inf, excess)
    stages = zip(memory.held, memory.capacity, strict=True)
    least = least_worst([every[stage] for stage in stages])
    assert least is not None, "grids have no more stages than layers"
    return least

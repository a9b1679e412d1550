"""Divides layers among virtual stages: pipelines whose devices hold several stages each.

Letters: G groups of devices, K stages, L layers, M micro-batches, a stage's first layer, b one past
its last. Group g of a pipeline of one stage a group holds stage g there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.plan.ranks import StageLayout
from meshwright.plan.spec import ScheduleName
from meshwright.program.codes import Codes, F, I
from meshwright.program.schedules import schedule_codes
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import (
    Array,
    Costs,
    distinct_replicas,
    group_capacity,
    group_times,
    stage_bytes,
)
from meshwright.search.layer_partition import cut_seconds
from meshwright.search.stage_devices import StageDevices
from meshwright.stopping import raise_if_stopped
from meshwright.techniques.activation_checkpointing.price import repeated_seconds

OVERFULL = 1e3
"""Penalty for needing twice a group's memory, in passes of the whole model through the busiest
group."""

EVENNESS = 1e-3
"""Weight of the groups' quadratic mean beside the busiest one."""

REACH = 4
"""Layers by which cuts are moved at most at once."""

Bounds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _CutTables:
    """Holds what a choice of cuts comes to: entry [k, a, b] is of stage k with layers [a, b)."""

    member: Array
    """[K, G], 1 where a group holds a stage."""
    loads: Array
    """Seconds of a micro-batch, there and back."""
    always: Array
    """Share of the devices' memory that is always in use."""
    each: Array
    """Share of it that each micro-batch in flight takes."""
    held: Array
    """[K, H] micro-batches of every stage in flight at moments of one group when most may be."""
    moments: NDArray[np.intp]
    """Index of the first moment of each group."""
    cuts: Array
    """Seconds [K - 1, L + 1] across the cut after each stage."""
    micro_batches: int


def cut_virtual_stages(
    costs: Costs,
    pipeline: CandidatePipeline,
    layout: StageLayout,
    schedule: ScheduleName,
    recompute: frozenset[int],
) -> tuple[Bounds, float]:
    """Returns the cuts [K + 1] of a pipeline's layers into the K stages of a layout, and the
    seconds of its micro-batches by `_seconds`; the groups in `recompute` recompute.

    From cuts in proportion to the groups' speeds, the layers between any two cuts are moved by one,
    or by a few where one does not help.
    """
    tables = _tables(costs, pipeline, layout, schedule, recompute)
    bounds = _proportional(tables)
    best = float(_seconds(tables, bounds[None])[0])
    shifts, reach = _shifts(len(bounds)), 1
    while reach <= REACH:
        raise_if_stopped()
        moved = bounds + reach * shifts
        moved = moved[(np.diff(moved, axis=1) > 0).all(axis=1)]
        seconds = _seconds(tables, moved, best) if len(moved) else np.array([np.inf])
        choice = int(seconds.argmin())
        if seconds[choice] < best * (1 - 1e-9):
            bounds, best, reach = moved[choice], float(seconds[choice]), 1
        else:
            reach += 1
    return tuple(bounds.tolist()), best


def _tables(
    costs: Costs,
    pipeline: CandidatePipeline,
    layout: StageLayout,
    schedule: ScheduleName,
    recompute: frozenset[int],
) -> _CutTables:
    places = group_by_stage(layout)
    stages, size = len(places), len(costs.model.layers) + 1
    loads, always, each = (np.zeros((stages, size, size)) for _ in range(3))
    for k, g in enumerate(places):
        raise_if_stopped()
        loads[k] = _loads(costs, pipeline.stages[g], recompute=g in recompute)
        always[k], each[k] = _shares(costs, pipeline.stages[g], recompute=g in recompute)
    cuts = np.zeros((max(stages - 1, 0), size))
    for k, (one, other) in enumerate(pairwise(places)):
        if one != other:
            cuts[k] = cut_seconds(costs, pipeline.stages[one], pipeline.stages[other])
    moments = _moments(schedule, layout, pipeline.micro_batches)
    return _CutTables(
        member=np.equal.outer(places, np.arange(len(layout))).astype(np.float64),
        loads=loads,
        always=always,
        each=each,
        held=np.concatenate(moments).T.astype(np.float64),
        moments=np.cumsum([0, *map(len, moments[:-1])]),
        cuts=cuts,
        micro_batches=pipeline.micro_batches,
    )


@lru_cache(maxsize=64)
def _moments(
    schedule: ScheduleName, layout: StageLayout, micro_batches: int
) -> list[NDArray[np.intp]]:
    """Returns the moments [H, K] of every group."""
    stages = sum(map(len, layout))
    return [_of_group(own, stages) for own in schedule_codes(schedule, layout, micro_batches)]


def _of_group(own: Codes, stages: int) -> NDArray[np.intp]:
    """Returns [H, K]: how many micro-batches of each stage are in flight when a backward is due. A
    moment is left out if every stage holds at least as many at another one."""
    now = [0] * stages
    found: dict[tuple[int, ...], None] = {}
    grown = False  # else there were as many of each before
    for code in own:
        kind, stage = code & 3, code >> 2
        if kind == F:
            now[stage] += 1
            grown = True
        else:
            if grown:
                found[tuple(now)] = None
                grown = False
            now[stage] -= kind != I
    every = np.array([*found], dtype=np.intp)
    within = np.ones((len(every), len(every)), dtype=bool)
    for held in every.T:
        within &= held[:, None] <= held
    covered = within.sum(axis=1) > 1
    kept: NDArray[np.intp] = every[~covered]
    return kept


def _loads(costs: Costs, stage: StageDevices, *, recompute: bool) -> Array:
    """Returns the seconds [L + 1, L + 1] of the slowest replica."""
    found: list[Array] = []
    for group, rows in distinct_replicas(costs, stage.groups, stage.rows):
        forward, backward = group_times(costs, group, rows)
        both = forward + backward
        if recompute:
            both = both + repeated_seconds(costs.model, (0, len(forward)), forward)
        sums = np.concatenate([[0.0], np.cumsum(both)])
        found.append(sums[None, :] - sums[:, None])
    worst: Array = np.max(found, axis=0)
    return worst


def _shares(costs: Costs, stage: StageDevices, *, recompute: bool) -> tuple[Array, Array]:
    """Returns the shares [L + 1, L + 1] of the fullest replica's memory: fixed, per micro-batch."""
    always: list[Array] = []
    each: list[Array] = []
    for group, rows in distinct_replicas(costs, stage.groups, stage.rows):
        fixed, moving = stage_bytes(costs, len(group), rows, recompute=recompute)
        always.append(fixed / group_capacity(costs, group))
        each.append(moving / group_capacity(costs, group))
    return np.max(always, axis=0), np.max(each, axis=0)


def _proportional(tables: _CutTables) -> NDArray[np.intp]:
    """Returns equal stages for every group, in proportion to its speed; at least one layer each."""
    stages, size = tables.loads.shape[0], tables.loads.shape[1]
    whole = tables.loads[:, 0, -1]
    done = (tables.loads[:, 0, :] / whole[:, None]).mean(axis=0)
    wanted = np.cumsum(1 / whole) / (1 / whole).sum()
    found = [0]
    for k in range(stages - 1):
        nearest = int(np.abs(done - wanted[k]).argmin())
        found.append(min(max(nearest, found[-1] + 1), size - stages + k))
    return np.array([*found, size - 1], dtype=np.intp)


@lru_cache(maxsize=64)
def _shifts(size: int) -> NDArray[np.intp]:
    """Returns every run of inner cuts, one layer to the left or to the right: what is between two
    of them moves along, so that any two stages can exchange a layer."""
    rows = []
    for first in range(1, size - 1):
        for last in range(first, size - 1):
            shift = np.zeros(size, dtype=np.intp)
            shift[first : last + 1] = 1
            rows += [shift, -shift]
    return np.array(rows, dtype=np.intp).reshape(-1, size)


def _seconds(tables: _CutTables, bounds: NDArray[np.intp], limit: float = float("inf")) -> Array:
    """Returns the seconds of each choice of cuts [N, K + 1]:

        M * busiest group + (G - 1) * slowest stage / 3 + transfers of one micro-batch

    and more where groups are overfull, of those that take less than `limit` without. A pipeline
    fills in the time of the forwards, a third, of G - 1 stages, not of G - 1 groups; while it
    drains there are gradients of weights to do. The groups' quadratic mean counts a little, for
    where two are the busiest, relieving one must show.
    """
    stages, groups = tables.member.shape
    at = np.arange(stages), bounds[:, :-1], bounds[:, 1:]
    load = tables.loads[at]
    busy = load @ tables.member
    busiest = busy.max(axis=1) + EVENNESS * np.sqrt((busy**2).mean(axis=1))
    across = tables.cuts[at[0][:-1], bounds[:, 1:-1]].sum(axis=1)
    seconds: Array = tables.micro_batches * busiest + (groups - 1) * load.max(axis=1) / 3 + across
    near = np.flatnonzero(seconds < limit)
    at = np.arange(stages), bounds[near, :-1], bounds[near, 1:]
    moving = np.maximum.reduceat(tables.each[at] @ tables.held, tables.moments, axis=1)
    excess = np.maximum(tables.always[at] @ tables.member + moving - 1, 0).sum(axis=1)
    seconds[near] += OVERFULL * tables.loads[:, 0, -1].max() * excess
    return seconds


def group_by_stage(layout: StageLayout) -> Sequence[int]:
    """Returns the group of every stage."""
    places = {k: g for g, held in enumerate(layout) for k in held}
    return [places[k] for k in range(len(places))]

"""Cuts a row of devices into stages: which neighbours are replicas, and which layers they take.

Letters: N tensor groups, L layers, M micro-batches, K stages from a tensor group to the end of the
row, tensor groups [i, j) and layers [a, b) of one stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

import numpy as np
from numpy.typing import NDArray

from meshwright.plan.spec import ScheduleName
from meshwright.search.boundary_prices import boundary_prices
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import (
    Array,
    Costs,
    TensorGroup,
    pace,
    reduced_width,
    ring,
    seconds_per_byte,
)
from meshwright.search.incumbent import Strategy
from meshwright.search.layer_partition import Stages, apportioned, fit_pipeline, stage_loads
from meshwright.search.space import divisors, groups_by_node, legal_widths, rows_by_type
from meshwright.search.stage_devices import StageDevices
from meshwright.stopping import raise_if_stopped

ROWS = 4
"""Sizes of micro-batches that every row of devices is cut for: those nearest to as many rows as
there are micro-batches. Climbs come to the others."""

DEPTHS = 3
"""Numbers of stages, the most promising ones, that a row of devices is cut into."""

NOTHING = 100
"""Steps that a draw is counted as if it leads to nothing."""

SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")

DEEPEST = 24
"""Most stages that are looked at."""

Choices = tuple[NDArray[np.int_], NDArray[np.int_]]
"""Say where the best stage ends [N + 1, L + 1] that begins at each tensor group and layer: the
tensor group and the layer after its last ones."""

Table = list[list[Array]]
"""Seconds [L + 1, L + 1], for each group i, of stages with groups [i, i + 1), [i, i + 2), ..."""


def cut_chain(
    costs: Costs, groups: Sequence[TensorGroup], rows: int, micro_batches: int
) -> Iterator[tuple[float, Stages]]:
    """Yields the best way to cut a row of tensor groups into every number of stages, with the
    seconds of

        (M - 1 + K) * the slowest stage's micro-batch and its part of the reduction

    and none for those that do not fit. The most promising come first, each written down when it is
    asked for.
    """
    number, layers = len(groups), len(costs.model.layers)
    borders = _borders(costs, groups, rows)
    best = np.full((number + 1, layers + 1), np.inf)
    best[number, layers] = 0.0
    choices: list[Choices] = []
    found = []
    depth = min(number, layers, DEEPEST)
    tables = _tables(costs, groups, rows, micro_batches, depth)
    for k, table in enumerate(tables, start=1):
        raise_if_stopped()
        best, choice = _one_stage_more(table, np.maximum(best, borders))
        choices.append(choice)
        if np.isfinite(best[0, 0]):
            seconds = float(best[0, 0]) * (micro_batches - 1 + k)
            found.append((seconds, k))
    for seconds, k in sorted(found):
        yield seconds, _traced(groups, choices[:k])


def _tables(
    costs: Costs, groups: Sequence[TensorGroup], rows: int, micro_batches: int, depth: int
) -> Iterator[Table]:
    """Yields the table of the stage that is the last of the row, the last but one, and so on: the
    earlier, the more micro-batches it holds."""
    sums = _reductions(costs, groups, rows, micro_batches)
    loads = _stage_loads(costs, groups, rows, 1)
    table = _with_reductions(loads, sums)
    yield table
    most = min(depth, micro_batches)
    ample = most == 1 or _equal(loads, _stage_loads(costs, groups, rows, most))
    for k in range(2, depth + 1):
        if not ample and k <= most:
            table = _with_reductions(_stage_loads(costs, groups[: 1 - k], rows, k), sums)
        yield table


def _one_stage_more(table: Table, after: Array) -> tuple[Array, Choices]:
    """Returns the least of the worst [N + 1, L + 1] over all stages that begin at each tensor group
    and layer, if `after` follows, and where those stages end."""
    best = np.full(after.shape, np.inf)
    groups, layers = np.zeros(after.shape, dtype=int), np.zeros(after.shape, dtype=int)
    at = np.arange(after.shape[1])
    ends = np.flatnonzero(np.isfinite(after).any(axis=1))  # no stage ends anywhere else
    for i in range(int(ends.max(initial=0))):
        own = [j for j in ends.tolist() if i < j <= i + len(table[i])]
        if not own:
            continue
        worst = [np.maximum(table[i][j - i - 1], after[j]) for j in own]
        least = np.array([each.min(axis=1) for each in worst])
        more = least.argmin(axis=0)
        best[i] = least[more, at]
        groups[i] = np.array(own)[more]
        layers[i] = np.array([worst[j][a] for a, j in enumerate(more.tolist())]).argmin(axis=1)
    return best, (groups, layers)


def _traced(groups: Sequence[TensorGroup], choices: Sequence[Choices]) -> Stages:
    """Returns the stages of the best way, from the first tensor group on."""
    stages, i, a = [], 0, 0
    for ends, layers in reversed(choices):
        j = int(ends[i, a])
        stages.append(tuple(groups[i:j]))
        i, a = j, int(layers[i, a])
    return tuple(stages)


def _stage_loads(costs: Costs, groups: Sequence[TensorGroup], rows: int, held: int) -> Table:
    """Returns the seconds of a micro-batch on a stage that holds `held` of them; infinite where
    they do not fit."""
    number = len(groups)
    table: Table = []
    for i in range(number):
        raise_if_stopped()
        ends = range(i + 1, min(number, i + rows) + 1)
        own = (apportioned(costs, tuple(groups[i:j]), rows) for j in ends)
        table.append([stage_loads(costs, stage, held) for stage in own])
    return table


def _equal(one: Table, other: Table) -> bool:
    """True if two tables are equal; arrays that they share are compared once."""
    pairs = ((a, b) for own in zip(one, other, strict=True) for a, b in zip(*own, strict=True))
    different = {(id(a), id(b)): (a, b) for a, b in pairs}.values()
    return all(np.array_equal(a, b) for a, b in different)


Reductions = list[list[tuple[float, Array]]]
"""For stages as in a table: the seconds in which one gradient is summed, and [L + 1, L + 1] those
of the part of the reduction that comes to a micro-batch."""


def _reductions(
    costs: Costs, groups: Sequence[TensorGroup], rows: int, micro_batches: int
) -> Reductions:
    number, gradients = len(groups), _gradients(costs, len(groups[0]))
    known: dict[float, Array] = {}
    found: Reductions = []
    for i in range(number):
        raise_if_stopped()
        ends = range(i + 1, min(number, i + rows) + 1)
        slopes = [_slope(costs, tuple(groups[i:j])) if j - i > 1 else 0.0 for j in ends]
        for slope in slopes:
            if slope not in known:
                known[slope] = gradients * slope / micro_batches
        found.append([(slope, known[slope]) for slope in slopes])
    return found


def _with_reductions(loads: Table, sums: Reductions) -> Table:
    """Returns loads with the reductions of stages of several tensor groups; sums that are alike are
    shared."""
    known: dict[tuple[int, float], Array] = {}
    table: Table = []
    for every, reductions in zip(loads, sums, strict=False):
        own = []
        for each, (slope, seconds) in zip(every, reductions, strict=False):
            key = id(each), slope
            if key not in known:
                known[key] = each + seconds if slope else each
            own.append(known[key])
        table.append(own)
    return table


def _gradients(costs: Costs, tensor: int) -> Array:
    """Returns the gradients [L + 1, L + 1] of layers [a, b) on one tensor rank."""
    trained = costs.table.weights.trained
    held = trained.replicated + trained.split / tensor
    found: Array = np.maximum(held[None, :] - held[:, None], 0.0)
    return found


def _slope(costs: Costs, groups: tuple[TensorGroup, ...]) -> float:
    """Returns the seconds in which tensor groups sum one gradient."""
    _, slope = seconds_per_byte(costs, [ring(costs, tuple(group[0] for group in groups))])
    return reduced_width(costs) * slope


def _borders(costs: Costs, groups: Sequence[TensorGroup], rows: int) -> Array:
    """Returns the seconds [N + 1, L + 1] in which a micro-batch passes from each tensor group to
    the next, if the model is cut there before each layer."""
    seconds = np.zeros((len(groups) + 1, len(costs.table.cut)))
    for j in range(1, len(groups)):
        here, there = StageDevices((groups[j - 1],), (rows,)), StageDevices((groups[j],), (rows,))
        sizes = costs.table.cut, costs.table.cut_gradient
        for way, size in zip(boundary_prices(costs, here, there), sizes, strict=True):
            seconds[j] = np.maximum(seconds[j], way.seconds(rows * size))
    return seconds


def cost_of_cutting(costs: Costs, number: int) -> int:
    """Returns the number of steps, of about a microsecond each, that `cut_chain` takes for a number
    of tensor groups."""
    elements = number**2 * (len(costs.model.layers) + 1) ** 2
    return int(min(number, DEEPEST) * (elements / 340 + 0.9 * number**2) + 120)


Chains = Iterator[tuple[int, list[Strategy]]]
"""Strategies, and the steps that they took."""


def chains(costs: Costs, chance: Random) -> Chains:
    """Yields pipelines cut from rows of devices, and the steps that it took: first type by type in
    every order, then, without end, in orders drawn at random and as one pipeline or two."""
    batch = costs.job.global_batch
    for groups in rows_by_type(costs):
        for rows in sorted(divisors(batch), key=lambda r: (max(r, batch / r), r))[:ROWS]:
            found = _scheduled([(each,) for each in _pipelines(costs, groups, rows, batch)])
            yield cost_of_cutting(costs, len(groups)), found
    while True:
        yield _drawn(costs, chance)


def _pipelines(
    costs: Costs, groups: tuple[TensorGroup, ...], rows: int, share: int
) -> list[CandidatePipeline]:
    """Returns the most promising pipelines of a row of tensor groups for a share of the batch."""
    schedule: ScheduleName = "1f1b"
    count = share // rows
    cut = islice(cut_chain(costs, groups, rows, count), DEPTHS)
    found = (fit_pipeline(costs, stages, rows, count, schedule) for _, stages in cut)
    return [fitted.pipeline for fitted in found if fitted]


def _drawn(costs: Costs, chance: Random) -> tuple[int, list[Strategy]]:
    """Draws nodes or tensor groups in any order, often not all of them, as one pipeline or two."""
    tensor = chance.choice(legal_widths(costs)[:2])
    nodes = groups_by_node(costs, tensor)
    chance.shuffle(nodes)
    groups = [group for own in nodes for group in own]
    if chance.random() < 0.4:
        chance.shuffle(groups)
    if chance.random() < 0.3:
        del groups[: chance.randint(1, max(1, len(groups) // 2))]
    if not groups:
        return NOTHING, []
    half = chance.randint(1, len(groups) - 1) if len(groups) > 1 and chance.random() < 0.3 else 0
    parts = [tuple(own) for own in (groups[:half], groups[half:]) if own]
    speeds = [sum(1 / pace(costs, group) for group in own) for own in parts]
    batch = costs.job.global_batch
    shares = [max(1, round(batch * speed / sum(speeds))) for speed in speeds]
    shares[-1] = batch - sum(shares[:-1])
    if shares[-1] < 1:
        return NOTHING, []
    spent, every = 0, []
    for own, share in zip(parts, shares, strict=True):
        sizes = divisors(share)
        every.append(_pipelines(costs, own, chance.choice(sizes), share))
        spent += cost_of_cutting(costs, len(own))
    return spent, _scheduled(list(zip(*every, strict=False)))


def _scheduled(found: Sequence[tuple[CandidatePipeline, ...]]) -> list[Strategy]:
    """Returns each candidate with either schedule, where it makes a difference."""
    return [
        (schedule, pipelines)
        for pipelines in found
        for schedule in SCHEDULES[: 1 + any(len(pipeline.stages) > 1 for pipeline in pipelines)]
    ]

"""Lists pipeline templates on a block of device classes, scored as if their stages were balanced.

Letters: F device classes, B builds (widths, blocks and rows), P pipelines: builds with depths, N
choices of widths and rows, K pipelines that are kept, C schedules, D depths of one build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from meshwright.plan.spec import ScheduleName
from meshwright.search.balanced_estimate import Builds, balanced, facts_by_build
from meshwright.search.costs import Array
from meshwright.search.device_classes import PipelineTemplate, StageRun, blocks_for
from meshwright.search.space import divisors
from meshwright.search.template_estimate import EstimateContext, Ints
from meshwright.stopping import raise_if_stopped

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
"""Stages on each device class of a pipeline over several; on one device class all numbers up to
MOST_DEPTHS are."""

MOST_DEPTHS = 128

MOST_CELLS = 16_000_000
"""Stages x layers x layers of a pipeline: its cuts are found in tables of them."""

DEPTH_GRID = 2_000
"""Depths of a pipeline over several device classes that are scored at once; beyond it every other
one is."""

RATIOS = (1, 2, 4)
"""How much wider the stages of one device class of a pipeline may be than those of another."""

ROW_SIZES = 6
"""Rows per replica that are tried: the smallest divisors of its share."""

AT_ONCE = 20_000
"""Pipelines that are scored at once: their arrays stay in the cache of a core."""

KEPT = 12
"""Depths that are kept for each choice of widths, rows, blocks and schedule."""

MOST_WIDTHS = 16
"""The most numbers of replicas of a stage that are tried: divisors of the batch."""

SLACK = 1.1
"""Times the best known strategy that a pipeline may take as if perfectly balanced."""


@dataclass(frozen=True, slots=True)
class Task:
    """Describes the pipelines to look for."""

    context: EstimateContext
    block: tuple[int, ...]
    """Device classes."""
    tensor: int
    share: float
    """Rows of the batch."""
    schedules: tuple[ScheduleName, ...]
    alone: bool
    """The share is the whole batch."""
    limit: float
    """Seconds of the best strategy so far."""


def group_count(context: EstimateContext, device_class: int, tensor: int) -> int:
    """Returns the number of tensor groups of a width in a device class."""
    return context.classes[device_class].each // tensor * len(context.classes[device_class].nodes)


def scored_templates(
    task: Task, order: tuple[int, ...]
) -> Iterator[tuple[float, PipelineTemplate]]:
    """Yields templates on these classes with their seconds as if stages were balanced, the
    fastest first."""
    builds = _builds(task, order)
    grids = _depth_grids(task, builds)
    if not grids:
        return
    sizes = np.array([grid.shape[1] for grid in grids])
    parts = []
    for part in np.split(np.arange(len(grids)), _changes(np.cumsum(sizes) // AT_ONCE)):
        raise_if_stopped()
        depths_FP = np.concatenate([grids[b] for b in part.tolist()], axis=1)
        parts.append(_fastest(task, builds, np.repeat(part, sizes[part]), depths_FP))
    seconds_K, group_K, depths_KF = (np.concatenate(each) for each in zip(*parts, strict=True))
    for k in np.lexsort((group_K, seconds_K)).tolist():
        b, c = divmod(int(group_K[k]), len(task.schedules))
        numbers = (depths_KF[k], builds.widths[b], builds.blocks[b])
        runs = map(StageRun, order, *(each.tolist() for each in numbers))
        rows, schedule = int(builds.rows[b]), task.schedules[c]
        yield float(seconds_K[k]), PipelineTemplate(task.tensor, tuple(runs), rows, schedule)


def _widths(task: Task, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the replicas of a stage on every device class of a pipeline: divisors of the batch,
    alike up to RATIOS."""
    most = [group_count(task.context, i, task.tensor) for i in order]
    every = divisors(task.context.costs.job.global_batch)
    every = every[:: -(-len(every) // MOST_WIDTHS)]
    ratios = RATIOS if len(order) < 3 else RATIOS[:2]
    steps = {*ratios, *(1 / ratio for ratio in ratios)}
    for first in (w for w in every if w <= min(most[0], task.share)):
        options = [[w for w in every if w <= limit and w / first in steps] for limit in most[1:]]
        for rest in product(*options):
            widths = (first, *rest)
            if max(widths) <= task.share and all(max(widths) % w == 0 for w in widths):
                yield widths


def _row_sizes(task: Task, widths: tuple[int, ...]) -> list[int]:
    """Returns the rows of a micro-batch on a replica of the widest stage: divisors of the batch's
    part."""
    batch, widest = task.context.costs.job.global_batch, max(widths)
    sizes = [r for r in divisors(batch // widest) if r * widest <= task.share]
    return [*sizes[:ROW_SIZES], *sizes[ROW_SIZES:][-1:]]


def _builds(task: Task, order: tuple[int, ...]) -> Builds:
    """Returns the widths, blocks and rows with which the micro-batches, without any loss on all
    devices that the widths can use, take less than the best strategy known."""
    context, layers = task.context, len(task.context.costs.model.layers)
    chosen = [(w, rows * max(w)) for w in _widths(task, order) for rows in _row_sizes(task, w)]
    width_NF = np.array([widths for widths, _ in chosen], dtype=np.int64).reshape(-1, len(order))
    rows_N = np.array([rows for _, rows in chosen], dtype=np.int64)
    rate_N = np.zeros(len(chosen))
    for i, width_N in zip(order, width_NF.T, strict=True):
        depth_N = np.minimum(group_count(context, i, task.tensor) // width_N, layers)
        rate_N += depth_N / facts_by_build(context, i, task.tensor, rows_N // width_N)[:, 0]
    able_N = task.share / rows_N / rate_N < SLACK * task.limit
    found = [
        (*widths, *blocks, rows)
        for (widths, rows), able in zip(chosen, able_N.tolist(), strict=True)
        if able
        for blocks in _block_choices(task, order, widths)
    ]
    number = len(order)
    table = np.array(found, dtype=np.int64).reshape(-1, 2 * number + 1)
    return Builds(order, task.tensor, table[:, :number], table[:, number:-1], table[:, -1])


def _changes(numbers: Ints) -> Ints:
    """Returns the indices at which a number differs from the one before."""
    return np.flatnonzero(np.diff(numbers)) + 1


def _fastest(
    task: Task, builds: Builds, build_P: Ints, depths_FP: Ints
) -> tuple[Array, Ints, Ints]:
    """Returns the KEPT fastest depths of every build and schedule: their seconds, the number of the
    build and the schedule, and the depths."""
    seconds_CP = balanced(task.context, builds, task.schedules, task.share, build_P, depths_FP)
    # With one stage or one micro-batch there is no order to choose.
    deepest_B = np.zeros(len(builds.rows), dtype=np.int64)
    np.maximum.at(deepest_B, build_P, depths_FP.sum(axis=0))
    alike_B = (task.share <= builds.rows) | (deepest_B == 1)
    seconds_CP[1:, alike_B[build_P]] = np.inf
    c_K, p_K = np.nonzero(seconds_CP < SLACK * task.limit)
    seconds_K, group_K = seconds_CP[c_K, p_K], build_P[p_K] * len(task.schedules) + c_K
    sorted_K = np.lexsort((p_K, seconds_K, group_K))
    groups = group_K[sorted_K]
    kept = sorted_K[np.arange(len(groups)) - np.searchsorted(groups, groups) < KEPT]
    return seconds_K[kept], group_K[kept], depths_FP[:, p_K[kept]].T


def _block_choices(
    task: Task, order: tuple[int, ...], widths: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Yields for each device class of a pipeline the number of replicas on one of its nodes: the
    most that fit, then the fewest; with a single class every number."""
    options = [
        blocks_for(task.context.classes[i].each // task.tensor, width)
        for i, width in zip(order, widths, strict=True)
    ]
    if len(order) == 1:
        yield from ((block,) for block in options[0])
        return
    yield from dict.fromkeys((tuple(o[-1] for o in options), tuple(o[0] for o in options)))


def _depth_grids(task: Task, builds: Builds) -> list[Ints]:
    """Returns the depths [F, D] of every build that the classes have nodes for and the model
    layers."""
    layers = len(task.context.costs.model.layers)
    layers = min(layers, MOST_DEPTHS, max(1, MOST_CELLS // layers**2))
    every = range(1, layers + 1) if len(builds.order) == 1 else [d for d in DEPTHS if d <= layers]
    ends_BF = np.empty_like(builds.widths)
    for f, i in enumerate(builds.order):
        device_class, block_B = task.context.classes[i], builds.blocks[:, f]
        nodes_B = len(device_class.nodes) // (builds.widths[:, f] // block_B)
        deepest_B = nodes_B * (device_class.each // builds.tensor // block_B)
        ends_BF[:, f] = np.searchsorted(every, deepest_B, side="right")
    known = task.context.grids
    for ends in map(tuple, np.unique(ends_BF, axis=0).tolist()):
        if ends not in known:
            known[ends] = _grid([every[:end] for end in ends], layers)
    return [known[ends] for ends in map(tuple, ends_BF.tolist())]


def _grid(options: list[Sequence[int]], layers: int) -> Ints:
    """Returns all depths [F, D] whose sum is at most the number of layers; if very many, every
    other one."""
    while prod(map(len, options)) > DEPTH_GRID:
        options = [option[::-2][::-1] if len(option) > 2 else option for option in options]
    grid = np.array(list(product(*options)), dtype=np.int64).reshape(-1, len(options))
    found: Ints = grid[grid.sum(axis=1) <= layers].T
    return found

"""Lists pipeline templates on a block of device classes, scored as if their stages were balanced.

Letters: F device classes, B builds (widths, blocks and rows), P pipelines: builds with depths, N
choices of widths and rows, K pipelines that are kept, D depths of one build.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from meshwright.search.balanced_estimate import (
    ROUNDING,
    BuildPrices,
    Builds,
    balanced,
    build_prices,
    facts_by_build,
    least_seconds,
)
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
"""Depths that are kept for each choice of widths, rows and blocks."""

MOST_WIDTHS = 16
"""The most numbers of replicas of a stage that are tried: divisors of the batch."""

SLACK = 1.1
"""Times the best known strategy that a pipeline may take as if perfectly balanced."""


@dataclass(frozen=True, slots=True)
class Task:
    """Says which pipelines to look for."""

    context: EstimateContext
    block: tuple[int, ...]
    """Device classes."""
    tensors: tuple[int, ...]
    """Devices of a replica on each of them."""
    share: float
    """Rows of the batch."""
    alone: bool
    """The share is the whole batch."""
    limit: float
    """Seconds of the best strategy so far."""


def group_count(context: EstimateContext, device_class: int, tensor: int) -> int:
    """Returns the number of tensor groups of a width in a device class."""
    return context.classes[device_class].each // tensor * len(context.classes[device_class].nodes)


def scored_templates(task: Task) -> Iterator[tuple[float, PipelineTemplate]]:
    """Yields templates on the classes of a task with their seconds as if stages were balanced, the
    fastest first."""
    builds = _builds(task)
    if not builds.rows.size:
        return
    prices = build_prices(task.context, builds)
    parts = [
        _fastest(task, prices, build_P, depths_FP)
        for build_P, depths_FP in _promising(task, prices, _depth_grids(task, builds))
    ]
    if not parts:
        return
    seconds_K, build_K, depths_KF = (np.concatenate(each) for each in zip(*parts, strict=True))
    for k in np.lexsort((build_K, seconds_K)).tolist():
        b = int(build_K[k])
        numbers = (depths_KF[k], builds.widths[b], builds.blocks[b])
        runs = map(StageRun, task.block, task.tensors, *(each.tolist() for each in numbers))
        yield float(seconds_K[k]), PipelineTemplate(tuple(runs), int(builds.rows[b]))


def _promising(
    task: Task, prices: BuildPrices, grids: Sequence[tuple[Ints, Ints]]
) -> Iterator[tuple[Ints, Ints]]:
    """Yields builds [P] with depths [F, P] whose work alone takes less than the best strategy
    known, about AT_ONCE together."""
    found: list[tuple[Ints, Ints]] = []
    waiting = 0
    for of_B, depths_FD in grids:
        for some_B in np.array_split(of_B, -(-len(of_B) * depths_FD.shape[1] // AT_ONCE)):
            raise_if_stopped()
            least_BD = least_seconds(task.context, prices, task.share, some_B, depths_FD)
            at_P, depth_P = np.nonzero(least_BD < SLACK * ROUNDING * task.limit)
            found.append((some_B[at_P], depths_FD[:, depth_P]))
            waiting += len(at_P)
            if waiting >= AT_ONCE:
                yield _joined(found)
                found, waiting = [], 0
    if waiting:
        yield _joined(found)


def _joined(found: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    builds, depths = zip(*found, strict=True)
    return np.concatenate(builds), np.concatenate(depths, axis=1)


def _widths(task: Task) -> Iterator[tuple[int, ...]]:
    """Yields the replicas of a stage on every device class of a pipeline: divisors of the batch,
    alike up to RATIOS."""
    most = [
        group_count(task.context, i, tensor)
        for i, tensor in zip(task.block, task.tensors, strict=True)
    ]
    every = divisors(task.context.costs.job.global_batch)
    every = every[:: -(-len(every) // MOST_WIDTHS)]
    ratios = RATIOS[: max(1, len(RATIOS) + 2 - len(task.block))]
    steps = {*ratios, *(1 / ratio for ratio in ratios)}
    for first in (w for w in every if w <= min(most[0], task.share)):
        options = [[w for w in every if w <= limit and w / first in steps] for limit in most[1:]]
        for rest in product(*options):
            widths = (first, *rest)
            if max(widths) <= task.share and all(max(widths) % w == 0 for w in widths):
                yield widths


def _row_sizes(task: Task, widths: tuple[int, ...]) -> list[int]:
    """Returns the rows of a micro-batch on a replica of the widest stage: divisors of its share."""
    batch, widest = task.context.costs.job.global_batch, max(widths)
    sizes = [r for r in divisors(batch // widest) if r * widest <= task.share]
    return [*sizes[:ROW_SIZES], *sizes[ROW_SIZES:][-1:]]


def _builds(task: Task) -> Builds:
    """Returns widths, blocks and rows that may beat the best strategy known: if no device that the
    widths can use were ever idle, their micro-batches would take less time."""
    context, layers = task.context, len(task.context.costs.model.layers)
    chosen = [(w, rows * max(w)) for w in _widths(task) for rows in _row_sizes(task, w)]
    width_NF = np.array([widths for widths, _ in chosen], dtype=np.int64)
    rows_N = np.array([rows for _, rows in chosen], dtype=np.int64)
    rate_N = np.zeros(len(chosen))
    columns = width_NF.reshape(-1, len(task.block)).T
    for i, tensor, width_N in zip(task.block, task.tensors, columns, strict=True):
        depth_N = np.minimum(group_count(context, i, tensor) // width_N, layers)
        rate_N += depth_N / facts_by_build(context, i, tensor, rows_N // width_N)[:, 0]
    able_N = task.share / rows_N / rate_N < SLACK * task.limit
    every_block = {widths: [*_block_choices(task, widths)] for widths in dict(chosen)}
    found = [
        (*widths, *blocks, rows)
        for (widths, rows), able in zip(chosen, able_N.tolist(), strict=True)
        if able
        for blocks in every_block[widths]
    ]
    number = len(task.block)
    table = np.array(found, dtype=np.int64).reshape(-1, 2 * number + 1)
    return Builds(task.block, task.tensors, table[:, :number], table[:, number:-1], table[:, -1])


def _fastest(
    task: Task, prices: BuildPrices, build_P: Ints, depths_FP: Ints
) -> tuple[Array, Ints, Ints]:
    """Returns the KEPT fastest depths of every build: their seconds, the number of the build, and
    the depths."""
    seconds_P = balanced(task.context, prices, task.share, build_P, depths_FP)
    p_K = np.flatnonzero(seconds_P < SLACK * task.limit)
    seconds_K, build_K = seconds_P[p_K], build_P[p_K]
    sorted_K = np.lexsort((p_K, seconds_K, build_K))
    numbers = build_K[sorted_K]
    kept = sorted_K[np.arange(len(numbers)) - np.searchsorted(numbers, numbers) < KEPT]
    return seconds_K[kept], build_K[kept], depths_FP[:, p_K[kept]].T


def _block_choices(task: Task, widths: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields how many replicas of a stage share a node: most, least; on one class all between."""
    options = [
        blocks_for(task.context.classes[i].each // tensor, width)
        for i, tensor, width in zip(task.block, task.tensors, widths, strict=True)
    ]
    if len(task.block) == 1:
        yield from ((block,) for block in options[0])
        return
    yield from dict.fromkeys((tuple(o[-1] for o in options), tuple(o[0] for o in options)))


def _depth_grids(task: Task, builds: Builds) -> list[tuple[Ints, Ints]]:
    """Returns the depths [F, D] of every build that the classes and the model allow."""
    layers = len(task.context.costs.model.layers)
    layers = min(layers, MOST_DEPTHS, max(1, MOST_CELLS // layers**2))
    every = range(1, layers + 1) if len(builds.order) == 1 else [d for d in DEPTHS if d <= layers]
    ends_BF = np.empty_like(builds.widths)
    for f, (i, tensor) in enumerate(zip(builds.order, builds.tensors, strict=True)):
        device_class, block_B = task.context.classes[i], builds.blocks[:, f]
        nodes_B = len(device_class.nodes) // (builds.widths[:, f] // block_B)
        deepest_B = nodes_B * (device_class.each // tensor // block_B)
        ends_BF[:, f] = np.searchsorted(every, deepest_B, side="right")
    known = task.context.grids
    found = []
    different, of_B = np.unique(ends_BF, axis=0, return_inverse=True)
    for number, ends in enumerate(map(tuple, different.tolist())):
        key = len(every), *ends
        if key not in known:
            known[key] = _grid([every[:end] for end in ends], layers)
        if known[key].size:
            found.append((np.flatnonzero(of_B.ravel() == number), known[key]))
    return found


def _grid(options: list[Sequence[int]], layers: int) -> Ints:
    """Returns all depths [F, D] together no more than the layers; of very many, every other one,
    and of very many classes equally many on each."""
    while prod(map(len, options)) > DEPTH_GRID and max(map(len, options)) > 2:
        options = [option[::-2][::-1] if len(option) > 2 else option for option in options]
    together: Iterable[tuple[int, ...]] = product(*options)
    if prod(map(len, options)) > DEPTH_GRID:
        longest = max(options, key=len)
        together = (tuple(min(d, option[-1]) for option in options) for d in longest)
    grid = np.array(list(together), dtype=np.int64).reshape(-1, len(options))
    found: Ints = grid[grid.sum(axis=1) <= layers].T
    return found

"""Searches clusters too large to list by device: pipeline templates on whole fleets of nodes.

Every width that divides the batch, every depth and every tensor width is scored with balanced
stages, whole arrays of depths at once; the best are cut exactly, and their shares of the batch
settled. Letters: D depths that are scored at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from meshwright.plan.spec import ScheduleName
from meshwright.search.balanced_estimate import Build, balanced
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, recomputing
from meshwright.search.device_classes import (
    Grouping,
    PipelineTemplate,
    RatedFleet,
    StageRun,
    blocks_for,
    fleets,
    groupings,
    nodes_for,
    written,
)
from meshwright.search.layer_partition import fit_line
from meshwright.search.plan_estimate import pace, seconds_by_counts, whole_seconds
from meshwright.search.space import divisors
from meshwright.search.template_estimate import (
    EstimateContext,
    Ints,
    TemplateEstimate,
    estimate_context,
    sketch,
    unit_facts,
)
from meshwright.stopping import raise_if_stopped

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
"""Stages on each fleet of a line over several; on one fleet all numbers up to MOST_DEPTHS are."""

MOST_DEPTHS = 128

MOST_CELLS = 16_000_000
"""Stages x layers x layers of a line: its cuts are found in tables of them."""

DEPTH_GRID = 2_000
"""Depths of a line over several fleets that are scored at once; beyond it every other one is."""

RATIOS = (1, 2, 4)
"""How much wider the stages of one fleet of a line may be than those of another."""

ROW_SIZES = 6
"""Rows per replica that are tried: the smallest divisors of its share."""

KEPT = 12
"""Of all arrays of one choice of widths and rows, depths that are followed up."""

SKETCHED = 1_200
"""Lines of one block of fleets that are cut, most promising first."""

OFFERED = 6
"""Lines of a block that are combined with those of other blocks."""

NEAR = 12
"""Micro-batches more or fewer than a line's ideal number that are tried."""

MOST_WIDTHS = 16
"""Replicas of a stage that are tried: of so many divisors of the batch, evenly spread."""

SLACK = 1.1
"""Times the best known strategy that a line may take as if perfectly balanced."""

Over = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy: templates with their numbers of micro-batches, and its seconds in closed form."""

    seconds: float
    context: EstimateContext
    sketches: tuple[TemplateEstimate, ...]
    counts: tuple[int, ...]


def fleet_strategies(
    costs: Costs, schedules: Sequence[ScheduleName], dropped: Counter[str], over: Over
) -> Iterator[tuple[ScheduleName, tuple[CandidatePipeline, ...]]]:
    """Strategies over whole fleets, best first, written down one at a time."""
    contexts = [estimate_context(costs, fleets(costs))]
    if costs.again is not None:
        contexts.append(estimate_context(recomputing(costs, costs.again), contexts[0].fleets))
    every: list[Choice] = []
    for context, tensor in product(contexts, _tensor_widths(contexts[0])):
        if every and over():
            break
        limit = min((choice.seconds for choice in every), default=float("inf"))
        every += _at_width(context, tensor, schedules, over, limit)
    every.sort(key=lambda choice: choice.seconds)
    for choice in _diverse(every):
        lines = _lines(choice)
        if lines is None:
            dropped["does not fit in memory"] += 1
        else:
            yield choice.sketches[0].template.schedule, lines


def _tensor_widths(context: EstimateContext) -> tuple[int, ...]:
    """Divisors of a fleet's devices per node that divide every layer."""
    units = {layer.along("tensor").units for layer in context.costs.model.layers}
    widths = {w for fleet in context.fleets for w in divisors(fleet.each)}
    return tuple(w for w in sorted(widths) if all(unit % w == 0 for unit in units))


def _diverse(every: Sequence[Choice]) -> Iterator[Choice]:
    """Returns at most two of one build."""
    builds: Counter[object] = Counter()
    for choice in every:
        build = tuple((s.template.tensor, s.template.segments) for s in choice.sketches)
        builds[build] += 1
        if builds[build] <= 2:
            yield choice


def _lines(choice: Choice) -> tuple[CandidatePipeline, ...] | None:
    context = choice.context
    taken: dict[int, int] = {}
    lines = []
    for each, count in zip(choice.sketches, choice.counts, strict=True):
        template = each.template
        stages = written(context.fleets, template, taken)
        fitted = fit_line(context.costs, stages, template.rows, count, template.schedule)
        if fitted is None:
            return None
        lines.append(fitted.line)
    return tuple(lines)


def _at_width(
    context: EstimateContext,
    tensor: int,
    schedules: Sequence[ScheduleName],
    over: Over,
    best: float,
) -> Iterator[Choice]:
    batch = context.costs.job.global_batch
    able = [
        RatedFleet(
            i, fleet.site, _units(context, i, tensor) / unit_facts(context, i, tensor, 1).whole
        )
        for i, fleet in enumerate(context.fleets)
        if fleet.each % tensor == 0
    ]
    able.sort(key=lambda rated: -rated.speed)
    known: dict[tuple[tuple[int, ...], bool, float], list[TemplateEstimate]] = {}
    for number, grouping in enumerate(sorted(groupings(able), key=_simplest_first)):
        if number and over():
            return
        speed = sum(rated.speed for block in grouping for rated in block)
        alone = len(grouping) == 1
        offers = []
        for block in grouping:
            numbers = tuple(rated.number for rated in block)
            share = batch * sum(rated.speed for rated in block) / speed
            key = (numbers, alone, share)
            if key not in known:
                task = Task(context, numbers, tensor, share, tuple(schedules), alone, best)
                known[key] = _offers(task)
            offers.append(known[key])
        if alone:
            for each in offers[0]:
                count = batch // each.template.rows
                found = Choice(
                    whole_seconds(context, (each,), (count,)), context, (each,), (count,)
                )
                best = min(best, found.seconds)
                yield found
            continue
        for chosen in product(*(offer[:OFFERED] for offer in offers)):
            raise_if_stopped()
            if best < float("inf") and over():
                return
            if len({each.template.schedule for each in chosen}) == 1:
                shared = _shared_out(context, chosen, batch)
                if shared is not None:
                    best = min(best, shared.seconds)
                    yield shared


def _simplest_first(grouping: Grouping) -> tuple[int, float]:
    """Few lines, then much speed: what is found early bounds what comes later."""
    return len(grouping), -sum(rated.speed for block in grouping for rated in block)


@dataclass(frozen=True, slots=True)
class Task:
    """Lines to look for."""

    context: EstimateContext
    block: tuple[int, ...]
    """Fleets."""
    tensor: int
    share: float
    """Rows of the batch."""
    schedules: tuple[ScheduleName, ...]
    alone: bool
    """The share is the whole batch."""
    limit: float
    """Seconds of the best strategy so far."""


def _units(context: EstimateContext, fleet: int, tensor: int) -> int:
    return context.fleets[fleet].each // tensor * len(context.fleets[fleet].nodes)


def _offers(task: Task) -> list[TemplateEstimate]:
    """The best lines of a block of fleets for about a share of the batch, best first."""
    scored: list[tuple[float, int, PipelineTemplate]] = []
    orders = dict.fromkeys((task.block, task.block[::-1]))
    for order in orders:
        for widths in _widths(task, order):
            raise_if_stopped()
            for each in _row_sizes(task, widths):
                rows = each * max(widths)
                if _ideal(task, order, widths, rows) < SLACK * task.limit:
                    for seconds, template in _scored(task, order, widths, rows):
                        scored.append((seconds, len(scored), template))
    scored.sort(key=lambda entry: entry[:2])
    found: list[tuple[float, int, TemplateEstimate]] = []
    best = task.limit
    for seconds, number, template in scored[:SKETCHED]:
        raise_if_stopped()
        if seconds > SLACK * best:
            break
        drawn = sketch(task.context, template, max(1, round(task.share / template.rows)))
        if drawn is not None:
            exact = whole_seconds(task.context, (drawn,), (task.share / template.rows,))
            best = min(best, exact)
            found.append((exact, number, drawn))
    found.sort(key=lambda entry: entry[:2])
    return [drawn for _, _, drawn in found[: 4 * OFFERED if task.alone else 2 * OFFERED]]


def _widths(task: Task, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Replicas of a stage on every fleet of a line: divisors of the batch, alike up to RATIOS."""
    most = [_units(task.context, i, task.tensor) for i in order]
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
    """Rows of a micro-batch on a replica of the widest stage: divisors of the batch's part."""
    batch, widest = task.context.costs.job.global_batch, max(widths)
    sizes = [r for r in divisors(batch // widest) if r * widest <= task.share]
    return [*sizes[:ROW_SIZES], *sizes[ROW_SIZES:][-1:]]


def _ideal(task: Task, order: tuple[int, ...], widths: tuple[int, ...], rows: int) -> float:
    """Seconds of all micro-batches on all devices that these widths can use, without any loss."""
    layers, rate = len(task.context.costs.model.layers), 0.0
    for i, width in zip(order, widths, strict=True):
        depth = min(_units(task.context, i, task.tensor) // width, layers)
        rate += depth / unit_facts(task.context, i, task.tensor, rows // width).whole
    return task.share / rows / rate


def _scored(
    task: Task, order: tuple[int, ...], widths: tuple[int, ...], rows: int
) -> Iterator[tuple[float, PipelineTemplate]]:
    """Templates of these widths and rows, with their seconds as if stages were balanced."""
    for blocks in _block_choices(task, order, widths):
        raise_if_stopped()
        grid_DF = _depth_grid(task, order, widths, blocks)
        if not len(grid_DF):
            continue
        for schedule in task.schedules:
            seconds_D = balanced(
                task.context,
                Build(order, task.tensor, widths, blocks, rows, schedule),
                task.share / rows,
                grid_DF,
            )
            best = np.argsort(seconds_D, kind="stable")[:KEPT]
            for i in best[seconds_D[best] < SLACK * task.limit]:
                segments = tuple(
                    StageRun(f, int(d), w, b)
                    for f, d, w, b in zip(order, grid_DF[i], widths, blocks, strict=True)
                )
                yield float(seconds_D[i]), PipelineTemplate(task.tensor, segments, rows, schedule)
            if task.share <= rows or grid_DF.sum(axis=1).max() == 1:
                break


def _block_choices(
    task: Task, order: tuple[int, ...], widths: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Replicas packed onto nodes, or spread over as many as can be; on one fleet all between."""
    options = [
        blocks_for(task.context.fleets[i].each // task.tensor, width)
        for i, width in zip(order, widths, strict=True)
    ]
    if len(order) == 1:
        yield from ((block,) for block in options[0])
        return
    yield from dict.fromkeys((tuple(o[-1] for o in options), tuple(o[0] for o in options)))


def _depth_grid(
    task: Task, order: tuple[int, ...], widths: tuple[int, ...], blocks: tuple[int, ...]
) -> Ints:
    """Depths [D, F] that the fleets have nodes for and the model layers."""
    key = (order, task.tensor, widths, blocks)
    known = task.context.grids.get(key)
    if known is not None:
        return known
    layers = len(task.context.costs.model.layers)
    layers = min(layers, MOST_DEPTHS, max(1, MOST_CELLS // layers**2))
    options = []
    for i, width, block in zip(order, widths, blocks, strict=True):
        fleet = task.context.fleets[i]
        units = fleet.each // task.tensor
        every = range(1, layers + 1) if len(order) == 1 else [d for d in DEPTHS if d <= layers]
        options.append([d for d in every if nodes_for(units, d, width, block) <= len(fleet.nodes)])
    while prod(map(len, options)) > DEPTH_GRID:
        options = [option[::-2][::-1] if len(option) > 2 else option for option in options]
    grid = np.array(list(product(*options)), dtype=np.int64).reshape(-1, len(order))
    found: Ints = grid[grid.sum(axis=1) <= layers]
    task.context.grids[key] = found
    return found


def _shared_out(
    context: EstimateContext, chosen: tuple[TemplateEstimate, ...], batch: int
) -> Choice | None:
    """Numbers of micro-batches near the lines' speeds that add up to the batch and end soonest."""
    paces = [pace(context, each) for each in chosen]
    ideals = [
        batch * pace / sum(paces) / each.template.rows
        for pace, each in zip(paces, chosen, strict=True)
    ]
    near = [
        range(max(1, round(ideal) - NEAR), max(1, round(ideal)) + NEAR + 1) for ideal in ideals[:-1]
    ]
    if len(near) > 1:
        near = [options[NEAR // 2 : -NEAR // 2] for options in near]
    best: Choice | None = None
    seconds_of = seconds_by_counts(context, chosen)
    for counts in product(*near):
        left = batch - sum(
            c * each.template.rows for c, each in zip(counts, chosen[:-1], strict=True)
        )
        last, rest = divmod(left, chosen[-1].template.rows)
        if left <= 0 or rest:
            continue
        seconds = seconds_of((*counts, last))
        if best is None or seconds < best.seconds:
            best = Choice(seconds, context, chosen, (*counts, last))
    return best

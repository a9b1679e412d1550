"""Searches clusters too large to list by device: pipeline templates on whole classes of nodes.

Every width that divides the batch, every depth and every tensor width is scored with balanced
stages, whole arrays of depths at once; the best are cut exactly, and their shares of the batch
settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice, product
from operator import itemgetter

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, recomputing
from meshwright.search.device_classes import (
    Grouping,
    RatedClass,
    device_classes,
    groupings,
    written,
)
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.plan_estimate import pace, seconds_by_counts, whole_seconds
from meshwright.search.space import divisors
from meshwright.search.template_builds import SLACK, Task, group_count, scored_templates
from meshwright.search.template_estimate import (
    EstimateContext,
    TemplateEstimate,
    estimate_context,
    estimate_template,
    group_facts,
)
from meshwright.stopping import raise_if_stopped

ESTIMATED = 1_200
"""Pipelines of one block of device classes that are cut, most promising first."""

OFFERED = 6
"""Pipelines of a block that are combined with those of other blocks."""

NEAR = 12
"""Micro-batches more or fewer than a pipeline's ideal number that are tried."""

OutOfTime = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """Describes a strategy: templates with their numbers of micro-batches, and its seconds in
    closed form."""

    seconds: float
    context: EstimateContext
    estimates: tuple[TemplateEstimate, ...]
    counts: tuple[int, ...]


def template_strategies(
    costs: Costs, schedules: Sequence[ScheduleName], pruned: Counter[str], out_of_time: OutOfTime
) -> Iterator[tuple[ScheduleName, tuple[CandidatePipeline, ...]]]:
    """Yields strategies over whole device classes, best first, written down one at a time."""
    contexts = [estimate_context(costs, device_classes(costs))]
    if costs.recomputed is not None:
        contexts.append(estimate_context(recomputing(costs, costs.recomputed), contexts[0].classes))
    every: list[Choice] = []
    for context, tensor in product(contexts, _tensor_widths(contexts[0])):
        if every and out_of_time():
            break
        limit = min((choice.seconds for choice in every), default=float("inf"))
        every += _at_width(context, tensor, schedules, out_of_time, limit)
    every.sort(key=lambda choice: choice.seconds)
    for choice in _diverse(every):
        pipelines = _pipelines(choice)
        if pipelines is None:
            pruned["does not fit in memory"] += 1
        else:
            yield choice.estimates[0].template.schedule, pipelines


def _tensor_widths(context: EstimateContext) -> tuple[int, ...]:
    """Returns the divisors of a device class's devices per node that divide every layer."""
    units = {layer.along("tensor").units for layer in context.costs.model.layers}
    widths = {w for device_class in context.classes for w in divisors(device_class.each)}
    return tuple(w for w in sorted(widths) if all(unit % w == 0 for unit in units))


def _diverse(every: Sequence[Choice]) -> Iterator[Choice]:
    """Returns at most two of one build."""
    builds: Counter[object] = Counter()
    for choice in every:
        build = tuple((s.template.tensor, s.template.runs) for s in choice.estimates)
        builds[build] += 1
        if builds[build] <= 2:
            yield choice


def _pipelines(choice: Choice) -> tuple[CandidatePipeline, ...] | None:
    context = choice.context
    taken: dict[int, int] = {}
    pipelines = []
    for each, count in zip(choice.estimates, choice.counts, strict=True):
        template = each.template
        stages = written(context.classes, template, taken)
        fitted = fit_pipeline(context.costs, stages, template.rows, count, template.schedule)
        if fitted is None:
            return None
        pipelines.append(fitted.pipeline)
    return tuple(pipelines)


def _at_width(
    context: EstimateContext,
    tensor: int,
    schedules: Sequence[ScheduleName],
    out_of_time: OutOfTime,
    best: float,
) -> Iterator[Choice]:
    batch = context.costs.job.global_batch
    known: dict[tuple[tuple[int, ...], bool, float], list[TemplateEstimate]] = {}
    for number, grouping in enumerate(
        sorted(groupings(_rated(context, tensor)), key=_simplest_first)
    ):
        if number and out_of_time():
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
                counts = (batch // each.template.rows,)
                seconds = whole_seconds(context, (each,), counts)
                best = min(best, seconds)
                yield Choice(seconds, context, (each,), counts)
            continue
        for chosen in product(*(offer[:OFFERED] for offer in offers)):
            raise_if_stopped()
            if best < float("inf") and out_of_time():
                return
            if len({each.template.schedule for each in chosen}) == 1:
                shared = _shared_out(context, chosen, batch)
                if shared is not None:
                    best = min(best, shared.seconds)
                    yield shared


def _rated(context: EstimateContext, tensor: int) -> list[RatedClass]:
    """Returns the device classes whose nodes a tensor width divides, fastest first."""
    able = [
        RatedClass(
            i,
            each.site,
            group_count(context, i, tensor) / group_facts(context, i, tensor, 1).whole,
        )
        for i, each in enumerate(context.classes)
        if each.each % tensor == 0
    ]
    return sorted(able, key=lambda rated: -rated.speed)


def _simplest_first(grouping: Grouping) -> tuple[int, float]:
    """Returns a key that sorts groupings by number of pipelines, then by speed, fastest first: what
    is found early bounds what comes later."""
    return len(grouping), -sum(rated.speed for block in grouping for rated in block)


def _offers(task: Task) -> list[TemplateEstimate]:
    """Returns the best pipelines of a block of classes for about a share of the batch, best
    first."""
    orders = dict.fromkeys((task.block, task.block[::-1]))
    scored = merge(*(scored_templates(task, order) for order in orders), key=itemgetter(0))
    found: list[tuple[float, int, TemplateEstimate]] = []
    best = task.limit
    for number, (seconds, template) in enumerate(islice(scored, ESTIMATED)):
        raise_if_stopped()
        if seconds > SLACK * best:
            break
        estimate = estimate_template(
            task.context, template, max(1, round(task.share / template.rows))
        )
        if estimate is not None:
            exact = whole_seconds(task.context, (estimate,), (task.share / template.rows,))
            best = min(best, exact)
            found.append((exact, number, estimate))
    found.sort(key=itemgetter(0, 1))
    return [estimate for _, _, estimate in found[: 4 * OFFERED if task.alone else 2 * OFFERED]]


def _shared_out(
    context: EstimateContext, chosen: tuple[TemplateEstimate, ...], batch: int
) -> Choice | None:
    """Returns numbers of micro-batches near the pipelines' speeds that add up to the batch and end
    soonest."""
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

"""Searches all strategies on whole classes of devices: which classes work in one pipeline, in which
order, how wide and how deep on each, and how the batch is shared out.

All widths, depths and sizes of micro-batches are scored with balanced stages, in whole arrays; the
best are cut exactly. Devices are counted, never listed, so that large clusters take no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise, permutations, product

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, recomputing
from meshwright.search.device_classes import (
    Grouping,
    PipelineTemplate,
    RatedClass,
    device_classes,
    fills,
    groupings,
    written,
)
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.pipeline_seconds import Order
from meshwright.search.plan_estimate import after, least_seconds, pace, whole_seconds
from meshwright.search.share_out import counts_near
from meshwright.search.space import divisors, legal_widths
from meshwright.search.template_builds import SLACK, Task, group_count, scored_templates
from meshwright.search.template_estimate import (
    EstimateContext,
    TemplateEstimate,
    estimate_context,
    estimate_template,
    group_facts,
)
from meshwright.stopping import raise_if_stopped

ESTIMATED, PATIENCE = 400, 40
"""Templates of one block of device classes that are cut, most promising first: at most, and after
the last one that was faster than all before."""

OFFERED = 6
"""Pipelines of a block that are combined with those of other blocks."""

COMBINED = 1_300
"""Combinations of pipelines of several blocks that are tried, about."""

ALIKE = 2
"""Strategies of one build that are offered."""

PACED = 6
"""Sizes of micro-batches at which the speed of a device class is looked at."""

TURNED = 3
"""Device classes of a pipeline up to which they are tried in every order."""

OutOfTime = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """Holds a strategy, templates with numbers of micro-batches, and its seconds in closed form."""

    seconds: float
    context: EstimateContext
    estimates: tuple[TemplateEstimate, ...]
    counts: tuple[int, ...]


def template_strategies(
    costs: Costs, order: Order, pruned: Counter[str], out_of_time: OutOfTime
) -> Iterator[tuple[ScheduleName, tuple[CandidatePipeline, ...]]]:
    """Yields strategies over whole device classes, best first, written down one at a time."""
    contexts = [estimate_context(costs, device_classes(costs), order)]
    if costs.recomputed is not None:
        again = recomputing(costs, costs.recomputed)
        contexts.append(estimate_context(again, contexts[0].classes, order))
    every: list[Choice] = []
    for context in contexts:
        limit = min((choice.seconds for choice in every), default=float("inf"))
        every += _choices(context, limit, out_of_time)
    every.sort(key=lambda choice: choice.seconds)
    schedule: ScheduleName = "gpipe" if order == "gpipe" else "1f1b"
    for choice in _diverse(every):
        pipelines = _pipelines(choice, schedule)
        if pipelines is None:
            pruned["does not fit in memory"] += 1
        else:
            yield schedule, pipelines


def _diverse(every: Sequence[Choice]) -> Iterator[Choice]:
    """Yields choices, at most ALIKE of one build."""
    builds: Counter[object] = Counter()
    for choice in every:
        build = tuple(estimate.template.runs for estimate in choice.estimates)
        builds[build] += 1
        if builds[build] <= ALIKE:
            yield choice


def _pipelines(choice: Choice, schedule: ScheduleName) -> tuple[CandidatePipeline, ...] | None:
    context = choice.context
    taken: dict[int, int] = {}
    pipelines = []
    for each, count in zip(choice.estimates, choice.counts, strict=True):
        stages = written(context.classes, each.template, taken)
        fitted = fit_pipeline(context.costs, stages, each.template.rows, count, schedule)
        if fitted is None:
            return None
        pipelines.append(fitted.pipeline)
    return tuple(pipelines)


def _choices(context: EstimateContext, best: float, out_of_time: OutOfTime) -> Iterator[Choice]:
    """Yields strategies of one tensor width, then pipelines with a width for every device class."""
    widths = _tensor_widths(context)
    batch = context.costs.job.global_batch
    for tensor in widths:
        known: Offers = {}
        for grouping in sorted(groupings(_rated(context, tensor)), key=_simplest_first):
            if best < float("inf") and out_of_time():
                return
            if batch / _speed(grouping) > best:
                continue
            for choice in _grouped(context, tensor, grouping, best, known):
                best = min(best, choice.seconds)
                yield choice
    single = [g[0] for g in groupings(_rated(context, 1)) if len(g) == 1 and len(g[0]) > 1]
    for block in single:
        numbers = tuple(rated.number for rated in block)
        for tensors in _unlike(context, numbers, widths):
            if out_of_time():
                return
            speed = sum(map(partial(_class_speed, context), numbers, tensors))
            if batch / speed > best:
                continue
            task = Task(context, numbers, tensors, batch, True, best)
            for choice in _alone(context, _offers(task)):
                best = min(best, choice.seconds)
                yield choice


def _tensor_widths(context: EstimateContext) -> tuple[int, ...]:
    """Returns the widths that divide every layer and leave little of some node unused."""
    sizes = {device_class.each for device_class in context.classes}
    widths = legal_widths(context.costs)
    return tuple(w for w in widths if any(fills(w, each) for each in sizes))


def _unlike(
    context: EstimateContext, block: tuple[int, ...], widths: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yields tensor widths of the classes of a block that are not all the same: all there are for
    two classes; for more, one width for the fastest of them and another for the rest."""
    each = [context.classes[i].each for i in block]
    traits = [_traits(context, i) for i in block]
    splits = [fast for fast in range(1, len(block)) if traits[fast - 1] != traits[fast]]
    for one, other in permutations(widths, 2):
        for fast in splits:
            chosen = (one,) * fast + (other,) * (len(block) - fast)
            if all(devices >= tensor for devices, tensor in zip(each, chosen, strict=True)):
                yield chosen


Offers = dict[tuple[tuple[object, ...], float], tuple[tuple[int, ...], list[TemplateEstimate]]]
"""Pipelines of a block of device classes for a share of the batch, after the classes: those of one
block are those of all that are alike."""


def _grouped(
    context: EstimateContext, tensor: int, grouping: Grouping, best: float, known: Offers
) -> Iterator[Choice]:
    """Yields strategies with a pipeline on each block of device classes."""
    batch = context.costs.job.global_batch
    speed = _speed(grouping)
    alone = len(grouping) == 1
    offers = []
    for block in grouping:
        numbers = tuple(rated.number for rated in block)
        share = batch * sum(rated.speed for rated in block) / speed
        key = tuple(_traits(context, number) for number in numbers), share
        if key not in known:
            task = Task(context, numbers, (tensor,) * len(numbers), share, alone, best)
            known[key] = numbers, _offers(task)
        offers.append(_on_others(*known[key], numbers))
        if not offers[-1]:
            return
    if alone:
        yield from _alone(context, offers[0])
        return
    for chosen in _combinations(context, grouping, offers):
        raise_if_stopped()
        if least_seconds(context, chosen) < best:
            shared = _shared_out(context, chosen, batch, best)
            if shared is not None:
                best = min(best, shared.seconds)
                yield shared


def _traits(context: EstimateContext, number: int) -> tuple[object, ...]:
    """Returns what tells a device class from others, its name and that of its site aside."""
    own = context.classes[number]
    alike = [each.site == own.site for each in context.classes]
    uplink = context.costs.links.uplinks[own.site]
    links = own.inside, own.network, own.joined, uplink
    return own.kind, own.each, len(own.nodes), own.island, *links, sum(alike)


def _on_others(
    before: tuple[int, ...], offers: list[TemplateEstimate], after: tuple[int, ...]
) -> list[TemplateEstimate]:
    """Returns the same pipelines on other device classes, which are alike."""
    if before == after:
        return offers
    number = dict(zip(before, after, strict=True))

    def moved(template: PipelineTemplate) -> PipelineTemplate:
        runs = (replace(run, device_class=number[run.device_class]) for run in template.runs)
        return replace(template, runs=tuple(runs))

    return [replace(each, template=moved(each.template)) for each in offers]


def _combinations(
    context: EstimateContext, grouping: Grouping, offers: Sequence[list[TemplateEstimate]]
) -> Iterator[tuple[TemplateEstimate, ...]]:
    """Pipelines for every block; of those that differ by an exchange of like blocks, one."""
    each = max(1, min(OFFERED, int(COMBINED ** (1 / len(offers)))))
    kinds = [tuple(_traits(context, rated.number) for rated in block) for block in grouping]
    before = [
        max((j for j in range(i) if kinds[j] == kinds[i]), default=i) for i in range(len(kinds))
    ]
    for places in product(*(range(min(each, len(offer))) for offer in offers)):
        if all(places[j] <= place for j, place in zip(before, places, strict=True)):
            yield tuple(offer[place] for offer, place in zip(offers, places, strict=True))


def _alone(context: EstimateContext, offers: Sequence[TemplateEstimate]) -> Iterator[Choice]:
    for each in offers:
        counts = (context.costs.job.global_batch // each.template.rows,)
        yield Choice(whole_seconds(context, (each,), counts), context, (each,), counts)


def _rated(context: EstimateContext, tensor: int) -> list[RatedClass]:
    """Returns the device classes whose nodes have a tensor group of this width: site by site, the
    fastest site and at each the fastest class first, so that pipelines cross from site to site
    once."""
    able = [
        RatedClass(i, each.site, _class_speed(context, i, tensor))
        for i, each in enumerate(context.classes)
        if each.each >= tensor
    ]
    sites: Counter[str] = Counter()
    for rated in able:
        sites[rated.site] += rated.speed  # type: ignore[assignment]
    return sorted(able, key=lambda rated: (-sites[rated.site], rated.site, -rated.speed))


def _class_speed(context: EstimateContext, device_class: int, tensor: int) -> float:
    """Returns the rows per second of all devices of a class that are never idle, at the best of a
    few sizes of micro-batches."""
    sizes = divisors(context.costs.job.global_batch)[:PACED]
    pace = min(group_facts(context, device_class, tensor, rows).whole / rows for rows in sizes)
    return group_count(context, device_class, tensor) / pace


def _speed(grouping: Grouping) -> float:
    return sum(rated.speed for block in grouping for rated in block)


def _simplest_first(grouping: Grouping) -> tuple[int, float]:
    """Ranks few pipelines first, then much speed: what is found early bounds what comes later."""
    return len(grouping), -_speed(grouping)


def _offers(task: Task) -> list[TemplateEstimate]:
    """Returns the best pipelines of a block of classes for about a share of the batch, in order."""
    orders = _orders(task)
    found: list[_Found] = []
    best, last = task.limit, 0
    for number, (seconds, template) in enumerate(islice(scored_templates(task), ESTIMATED)):
        raise_if_stopped()
        if seconds > SLACK * best or number - last > PATIENCE:
            break
        known = len(found)
        for turned in orders[:2]:
            found += _in_order(task, template, turned, len(found))
        least = min((each[0] for each in found[known:]), default=best)
        if least < best:
            best, last = least, number
    for _, _, template, _ in sorted(found)[:OFFERED]:
        for turned in orders[2:]:
            found += _in_order(task, template, turned, len(found))
        for around in _around(template):
            found += _in_order(task, around, range(len(around.runs)), len(found))
    most = (4 if task.alone else 2) * OFFERED
    return [estimate for _, _, _, estimate in sorted(found)[:most]]


def _around(template: PipelineTemplate) -> Iterator[PipelineTemplate]:
    """Yields a pipeline of two classes with some stages of one before and the rest after those of
    the other: the first and the last stage have more to compute than layers show."""
    if len(template.runs) != 2:
        return
    for outer, inner in (template.runs, template.runs[::-1]):
        for before in sorted({1, outer.depth // 2, outer.depth - 1} & set(range(1, outer.depth))):
            parts = replace(outer, depth=before), replace(outer, depth=outer.depth - before)
            yield PipelineTemplate((parts[0], inner, parts[1]), template.rows)


_Found = tuple[float, int, PipelineTemplate, TemplateEstimate]
"""Seconds, a number that tells it from all others, a template before and after it was turned."""


def _in_order(
    task: Task, template: PipelineTemplate, order: Sequence[int], number: int
) -> Iterator[_Found]:
    """Yields a template with its classes in another order, if it fits."""
    turned = PipelineTemplate(tuple(template.runs[i] for i in order), template.rows)
    count = max(1, round(task.share / template.rows))
    estimate = estimate_template(task.context, turned, count)
    if estimate is not None:
        exact = whole_seconds(task.context, (estimate,), (task.share / template.rows,))
        yield exact, number, template, estimate


def _orders(task: Task) -> list[tuple[int, ...]]:
    """Returns orders of the classes of a block that stay at a site until they leave it for good;
    first as they are and the other way round."""
    number = len(task.block)
    sites = [task.context.classes[i].site for i in task.block]
    if number <= TURNED:
        every = [tuple(range(number)), tuple(range(number))[::-1], *permutations(range(number))]
    else:
        halves = [[i for i in range(number) if sites[i] == site] for site in dict.fromkeys(sites)]
        every = []
        for some in (halves, halves[::-1]):
            for turn in (1, -1):
                every.append(tuple(i for half in some for i in half[::turn]))
    return [order for order in dict.fromkeys(every) if _crossings(sites, order) < len(set(sites))]


def _crossings(sites: Sequence[str], order: Sequence[int]) -> int:
    return sum(sites[i] != sites[j] for i, j in pairwise(order))


def _shared_out(
    context: EstimateContext,
    chosen: tuple[TemplateEstimate, ...],
    batch: int,
    best: float = float("inf"),
) -> Choice | None:
    """Returns numbers of micro-batches near the pipelines' speeds that add up to the batch and end
    soonest."""
    paces = [pace(context, each) for each in chosen]
    rows = [each.template.rows for each in chosen]

    def end(counts: tuple[int, ...]) -> float:
        return max(
            fill + count * each / speed
            for (fill, speed), count, each in zip(paces, counts, rows, strict=True)
        )

    counts = min(counts_near([speed for _, speed in paces], rows, batch), key=end, default=None)
    if counts is None or end(counts) + after(context, chosen) >= best:
        return None
    return Choice(whole_seconds(context, chosen, counts), context, chosen, counts)

"""Searches all strategies on whole classes of devices: which classes work in one pipeline, in which
order, how wide and how deep on each, and how the batch is shared out.

All widths, depths and sizes of micro-batches are scored with balanced stages, in whole arrays; the
best are cut exactly. Devices are counted, never listed, so that large clusters take no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, permutations, product
from operator import itemgetter

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, recomputing
from meshwright.search.device_classes import (
    Grouping,
    PipelineTemplate,
    RatedClass,
    device_classes,
    groupings,
    written,
)
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.pipeline_seconds import Order
from meshwright.search.plan_estimate import pace, seconds_by_counts, whole_seconds
from meshwright.search.share_out import counts_near
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

ESTIMATED = 400
"""Templates of one block of device classes that are cut, most promising first."""

OFFERED = 6
"""Pipelines of a block that are combined with those of other blocks."""

COMBINED = 1_300
"""Combinations of pipelines of several blocks that are tried, about."""

ALIKE = 2
"""Strategies of one build that are offered."""

TURNED = 3
"""Device classes of a pipeline up to which they are tried in every order."""

OutOfTime = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy: templates with their numbers of micro-batches, and its seconds in closed form."""

    seconds: float
    context: EstimateContext
    estimates: tuple[TemplateEstimate, ...]
    counts: tuple[int, ...]


def template_strategies(
    costs: Costs, order: Order, pruned: Counter[str], out_of_time: OutOfTime
) -> Iterator[tuple[ScheduleName, tuple[CandidatePipeline, ...]]]:
    """Strategies over whole device classes, best first, written down one at a time."""
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
    """Returns at most ALIKE of one build."""
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
    """Strategies of one tensor width, then pipelines with a width for every device class."""
    widths = _tensor_widths(context)
    for tensor in widths:
        for grouping in sorted(groupings(_rated(context, tensor)), key=_simplest_first):
            if best < float("inf") and out_of_time():
                return
            for choice in _grouped(context, tensor, grouping, best):
                best = min(best, choice.seconds)
                yield choice
    single = [g[0] for g in groupings(_rated(context, 1)) if len(g) == 1 and len(g[0]) > 1]
    for block in single:
        numbers = tuple(rated.number for rated in block)
        for tensors in _unlike(context, numbers, widths):
            if out_of_time():
                return
            task = Task(context, numbers, tensors, context.costs.job.global_batch, True, best)
            for choice in _alone(context, _offers(task)):
                best = min(best, choice.seconds)
                yield choice


def _tensor_widths(context: EstimateContext) -> tuple[int, ...]:
    """Divisors of a device class's devices per node that divide every layer."""
    units = {layer.along("tensor").units for layer in context.costs.model.layers}
    widths = {w for device_class in context.classes for w in divisors(device_class.each)}
    return tuple(w for w in sorted(widths) if all(unit % w == 0 for unit in units))


def _unlike(
    context: EstimateContext, block: tuple[int, ...], widths: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Tensor widths of the classes of a block that are not all the same: all there are for two
    classes; for more, one width for the fastest of them and another for the rest."""
    each = [context.classes[i].each for i in block]
    for one, other in permutations(widths, 2):
        for fast in range(1, len(block)):
            chosen = (one,) * fast + (other,) * (len(block) - fast)
            if all(devices % tensor == 0 for devices, tensor in zip(each, chosen, strict=True)):
                yield chosen


def _grouped(
    context: EstimateContext, tensor: int, grouping: Grouping, best: float
) -> Iterator[Choice]:
    """Strategies with a pipeline on each block of device classes."""
    batch = context.costs.job.global_batch
    speed = sum(rated.speed for block in grouping for rated in block)
    alone = len(grouping) == 1
    offers = []
    for block in grouping:
        numbers = tuple(rated.number for rated in block)
        share = batch * sum(rated.speed for rated in block) / speed
        task = Task(context, numbers, (tensor,) * len(numbers), share, alone, best)
        offers.append(_offers(task))
    if alone:
        yield from _alone(context, offers[0])
        return
    each = max(1, min(OFFERED, int(COMBINED ** (1 / len(offers)))))
    for chosen in product(*(offer[:each] for offer in offers)):
        raise_if_stopped()
        shared = _shared_out(context, chosen, batch)
        if shared is not None:
            yield shared


def _alone(context: EstimateContext, offers: Sequence[TemplateEstimate]) -> Iterator[Choice]:
    for each in offers:
        counts = (context.costs.job.global_batch // each.template.rows,)
        yield Choice(whole_seconds(context, (each,), counts), context, (each,), counts)


def _rated(context: EstimateContext, tensor: int) -> list[RatedClass]:
    """Returns the device classes whose nodes a tensor width divides: site by site, the fastest site
    and at each the fastest class first, so that pipelines cross from site to site once."""
    able = [
        RatedClass(
            i,
            each.site,
            group_count(context, i, tensor) / group_facts(context, i, tensor, 1).whole,
        )
        for i, each in enumerate(context.classes)
        if each.each % tensor == 0
    ]
    sites: Counter[str] = Counter()
    for rated in able:
        sites[rated.site] += rated.speed  # type: ignore[assignment]
    return sorted(able, key=lambda rated: (-sites[rated.site], rated.site, -rated.speed))


def _simplest_first(grouping: Grouping) -> tuple[int, float]:
    """Few pipelines, then much speed: what is found early bounds what comes later."""
    return len(grouping), -sum(rated.speed for block in grouping for rated in block)


def _offers(task: Task) -> list[TemplateEstimate]:
    """The best pipelines of a block of classes for about a share of the batch, best first."""
    orders = _orders(task)
    found: list[tuple[float, int, TemplateEstimate]] = []
    best = task.limit
    for number, (seconds, template) in enumerate(islice(scored_templates(task), ESTIMATED)):
        raise_if_stopped()
        if seconds > SLACK * best:
            break
        for turned in orders:
            runs = tuple(template.runs[i] for i in turned)
            estimate = estimate_template(
                task.context,
                PipelineTemplate(runs, template.rows),
                max(1, round(task.share / template.rows)),
            )
            if estimate is not None:
                exact = whole_seconds(task.context, (estimate,), (task.share / template.rows,))
                best = min(best, exact)
                found.append((exact, len(orders) * number, estimate))
    found.sort(key=itemgetter(0, 1))
    return [estimate for _, _, estimate in found[: 4 * OFFERED if task.alone else 2 * OFFERED]]


def _orders(task: Task) -> list[tuple[int, ...]]:
    """Orders of the classes of a block that stay at a site until they leave it for good."""
    number = len(task.block)
    sites = [task.context.classes[i].site for i in task.block]
    if number <= TURNED:
        every = list(permutations(range(number)))
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
    context: EstimateContext, chosen: tuple[TemplateEstimate, ...], batch: int
) -> Choice | None:
    """Numbers of micro-batches near the pipelines' speeds that add up to the batch and end
    soonest."""
    paces = [pace(context, each) for each in chosen]
    rows = [each.template.rows for each in chosen]
    seconds_of = seconds_by_counts(context, chosen)
    best = min(
        ((seconds_of(counts), counts) for counts in counts_near(paces, rows, batch)),
        default=None,
    )
    return Choice(best[0], context, chosen, best[1]) if best else None

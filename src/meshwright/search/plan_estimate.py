"""Estimates the step of a plan of several pipeline templates, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meshwright.cost.links import overhead_seconds
from meshwright.search.template_estimate import EstimateContext, TemplateEstimate, hop_latency


def after(context: EstimateContext, estimates: Sequence[TemplateEstimate]) -> float:
    """Returns the seconds after the last pipeline: norm over all devices, slowest optimizer,
    overhead; and the uplinks, where pipelines at several sites hold the same layers."""
    used = {s.device_class for each in estimates for s in each.template.runs}
    count = sum(each.template.devices for each in estimates)
    sites = {context.classes[number].site for number in used}
    step = max(hop_latency(context.costs, context.classes[number].network) for number in used)
    if len(sites) > 1:
        uplinks = [u.latency for site in sites if (u := context.costs.links.uplinks[site])]
        step += max(uplinks, default=0.0)
    norm = 2 * (count - 1) * step if count > 1 else 0.0
    optimizer = max(each.optimizer for each in estimates)
    return norm + optimizer + overhead_seconds(context.costs.profile)


def between_sites(context: EstimateContext, estimates: Sequence[TemplateEstimate]) -> float:
    """Returns the seconds in which the gradients of pipelines at several sites pass the uplinks."""
    homes = [
        {context.classes[s.device_class].site for s in each.template.runs} for each in estimates
    ]
    sites = set.union(*homes)
    if len(sites) < 2 or len(estimates) < 2:
        return 0.0
    links = [link for site in sites if (link := context.costs.links.uplinks[site])]
    ring = max(sum(s.width for s in each.template.runs) for each in estimates) * len(estimates)
    return max(
        (2 * context.gradients / link.bandwidth + 2 * ring * link.latency for link in links),
        default=0.0,
    )


def pace(context: EstimateContext, each: TemplateEstimate) -> float:
    """Returns the rows per second of a pipeline that is full."""
    found = context.paces.get(each)
    if found is None:
        found = context.paces[each] = each.template.rows / (each.further(33) / 32)
    return found


def whole_seconds(
    context: EstimateContext, estimates: Sequence[TemplateEstimate], counts: Sequence[float]
) -> float:
    """Returns the seconds of a step of these pipelines with these numbers of micro-batches."""
    return seconds_by_counts(context, estimates)(counts)


def seconds_by_counts(
    context: EstimateContext, estimates: Sequence[TemplateEstimate]
) -> Callable[[Sequence[float]], float]:
    """Returns the seconds of a step of these pipelines as a function of their numbers of
    micro-batches. What a pipeline takes with a number is worked out once: thousands of combinations
    have few numbers."""
    delay = context.costs.system.reduction_delay
    crowded = len(estimates) > 1
    rendezvous, later = between_sites(context, estimates), after(context, estimates)
    exposed = [max(each.exposed(delay, crowded=crowded), rendezvous) for each in estimates]
    known: list[dict[float, float]] = [{} for _ in estimates]

    def alone(k: int, count: float) -> float:
        if count not in known[k]:
            known[k][count] = estimates[k].once + estimates[k].further(count) + exposed[k]
        return known[k][count]

    return lambda counts: later + max(alone(k, count) for k, count in enumerate(counts))

"""Estimates the step of a plan of several pipeline templates, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.cost.collective import least_sum_steps
from meshwright.cost.links import overhead_seconds
from meshwright.search.costs import hop_latency
from meshwright.search.pipeline_seconds import pipeline_seconds
from meshwright.search.template_estimate import EstimateContext, TemplateEstimate


def after(context: EstimateContext, estimates: Sequence[TemplateEstimate]) -> float:
    """Returns the seconds after the last pipeline: norm over all devices, slowest optimizer,
    overhead; and the uplinks, where pipelines at several sites hold the same layers."""
    used = {s.device_class for each in estimates for s in each.template.runs}
    count = sum(each.template.devices for each in estimates)
    sites = {context.classes[number].site for number in used}
    networks = [context.classes[number].network for number in used]
    step = max(hop_latency(context.costs, network) for network in networks)
    if len(sites) > 1:
        uplinks = [u.latency for site in sites if (u := context.costs.links.uplinks[site])]
        step += max(uplinks, default=0.0)
    norm = max(least_sum_steps(network, count) for network in networks) * step
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


def pace(context: EstimateContext, each: TemplateEstimate) -> tuple[float, float]:
    """Returns the seconds until a pipeline is full and after that it drains, and its rows per
    second while it is full."""
    key = each.template, each.bounds
    found = context.paces.get(key)
    if found is None:
        some, many = (pipeline_seconds(each.prices, count, context.order) for count in (17, 49))
        slope = (many - some) / 32
        found = context.paces[key] = max(0.0, many - 49 * slope), each.template.rows / slope
    return found


def least_seconds(context: EstimateContext, estimates: Sequence[TemplateEstimate]) -> float:
    """Returns the seconds of a step if all pipelines end together and hide their reductions."""
    paces = [pace(context, each) for each in estimates]
    speed = sum(each for _, each in paces)
    filled = sum(fill * each for fill, each in paces)
    least = (context.costs.job.global_batch + filled) / speed
    return least + between_sites(context, estimates) + after(context, estimates)


def whole_seconds(
    context: EstimateContext, estimates: Sequence[TemplateEstimate], counts: Sequence[float]
) -> float:
    """Returns the seconds of a step of these pipelines with these numbers of micro-batches."""
    delay = context.costs.system.reduction_delay
    crowded = len(estimates) > 1
    rendezvous = between_sites(context, estimates)
    ends = [
        pipeline_seconds(each.prices, max(1, round(count)), context.order)
        + max(each.exposed(delay, crowded=crowded), rendezvous)
        for each, count in zip(estimates, counts, strict=True)
    ]
    return max(ends) + after(context, estimates)

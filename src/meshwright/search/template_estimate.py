"""Estimates the step of a pipeline template with its best cuts; devices are counted, never listed.

Letters: S stages, L layers, M micro-batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Link, flow_seconds
from meshwright.cost.collective import least_sum_steps
from meshwright.cost.weights import stage_parameters
from meshwright.plan.spec import ScheduleName
from meshwright.program.schedules import in_flight
from meshwright.search.boundary_prices import copies
from meshwright.search.bounds import optimizer_of
from meshwright.search.candidate import divide_the_widest
from meshwright.search.costs import (
    Costs,
    group_capacity,
    group_prefix,
    hop_latency,
    micro_batches_held,
    reduced_width,
    split_prefix,
    stage_bytes,
    usual_cut_bytes,
)
from meshwright.search.device_classes import DeviceClass, PipelineTemplate, StageRun
from meshwright.search.pipeline_seconds import Order, PipelinePrices, add_host, let_senders_wait

Ints = NDArray[np.int64]

HALVINGS = 14
"""Bisections of the slowest stage's seconds: to a ten-thousandth of the interval."""


@dataclass(frozen=True, slots=True)
class TemplateEstimate:
    """Holds a template with its cuts, and its seconds by part."""

    template: PipelineTemplate
    bounds: tuple[int, ...]
    prices: PipelinePrices
    reduction: tuple[float, ...]
    """Seconds of every stage's gradients, if this template is the whole plan."""
    crowded: tuple[float, ...]
    """The same if other pipelines hold the stage's layers too."""
    optimizer: float

    def exposed(self, delay: float, *, crowded: bool) -> float:
        """Returns the seconds of the reductions that no backward hides."""
        before, worst, prices = 0.0, 0.0, self.prices
        for s, seconds in enumerate(self.crowded if crowded else self.reduction):
            worst = max(worst, seconds - prices.backward[s] * (1 - delay) - before)
            before += prices.backward[s] + (prices.ahead[s] if s < len(prices.ahead) else 0.0)
        return worst


class GroupFacts(NamedTuple):
    """Holds what the whole model takes on one tensor group, at some rows of a micro-batch."""

    whole: float
    """Seconds of all layers."""
    longest: float
    """Seconds of the longest layer."""
    common: float
    """Seconds of one layer of the commonest kind."""
    always: float
    """Bytes on each device, whatever is in flight."""
    each: float
    """Bytes for every micro-batch in flight."""
    room: float
    """Bytes that a device has."""


@dataclass(slots=True)
class EstimateContext:
    """Holds what the estimates of many templates share."""

    costs: Costs
    order: Order
    """The order of work that pipelines are estimated in."""
    classes: tuple[DeviceClass, ...]
    widest_cut: float
    """Bytes that a row carries across a usual cut."""
    gradients: float
    """Bytes of the whole model's gradients."""
    common: tuple[int, int]
    """First of the commonest layers, and how many there are."""
    reaches: dict[tuple[int, int, int, int], list[int]] = field(default_factory=dict)
    totals: dict[tuple[int, int, int], tuple[list[float], list[float], list[float]]] = field(
        default_factory=dict
    )
    cuts: dict[tuple[object, ...], tuple[int, ...] | None] = field(default_factory=dict)
    groups: dict[tuple[int, int, int], GroupFacts] = field(default_factory=dict)
    grids: dict[tuple[int, ...], Ints] = field(default_factory=dict)
    """Depths worth a look, by the number of them for every class."""
    paces: dict[tuple[PipelineTemplate, tuple[int, ...]], tuple[float, float]] = field(
        default_factory=dict
    )
    """Seconds to fill and drain, and rows per second, of templates with cuts."""


def estimate_context(costs: Costs, every: tuple[DeviceClass, ...], order: Order) -> EstimateContext:
    """Makes a context in which nothing has been computed yet."""
    names = [layer.signature for layer in costs.model.layers]
    common, number = Counter(names).most_common(1)[0]
    return EstimateContext(
        costs=costs,
        order=order,
        classes=every,
        widest_cut=usual_cut_bytes(costs),
        gradients=float(stage_parameters(costs.table.weights, (0, len(names)), 1))
        * reduced_width(costs),
        common=(names.index(common), number),
    )


def group_facts(context: EstimateContext, device_class: int, tensor: int, rows: int) -> GroupFacts:
    """Returns what balanced stages ask of a tensor group."""
    key = (device_class, tensor, rows)
    found = context.groups.get(key)
    if found is None:
        both = prefixes(context, device_class, tensor, rows)[2]
        always, each = stage_bytes(context.costs, tensor, rows)
        at = context.common[0]
        found = context.groups[key] = GroupFacts(
            whole=both[-1],
            longest=max(b - a for a, b in pairwise(both)),
            common=both[at + 1] - both[at],
            always=float(always[0, -1]),
            each=float(each[0, -1]),
            room=group_capacity(context.costs, context.classes[device_class].nodes[0][:tensor]),
        )
    return found


def prefixes(
    context: EstimateContext, device_class: int, tensor: int, rows: int
) -> tuple[list[float], list[float], list[float]]:
    """Returns the cumulative seconds [L + 1] of forward, backward and both on a tensor group."""
    key = (device_class, tensor, rows)
    found = context.totals.get(key)
    if found is None:
        group = context.classes[device_class].nodes[0][:tensor]
        forward, backward = group_prefix(context.costs, group, rows)
        both = [f + b for f, b in zip(forward, backward, strict=True)]
        found = context.totals[key] = (forward, backward, both)
    return found


def _reach(
    context: EstimateContext, device_class: int, tensor: int, rows: int, held: int
) -> list[int]:
    """Returns, for each first layer, the end of the longest range that a tensor group can hold."""
    key = (device_class, tensor, rows, held)
    found = context.reaches.get(key)
    if found is None:
        always, each = stage_bytes(context.costs, tensor, rows)
        room = group_capacity(context.costs, context.classes[device_class].nodes[0][:tensor])
        size = len(always)
        beyond = always + each * held > room
        beyond &= ~np.tri(size, dtype=bool)
        first = np.where(beyond.any(axis=1), beyond.argmax(axis=1), size)
        found = context.reaches[key] = (first - 1).tolist()
    return found


def cuts(
    context: EstimateContext, template: PipelineTemplate, micro_batches: int
) -> tuple[int, ...] | None:
    """Returns the cuts whose slowest stage is quickest, among those that fit; None if none does."""
    depth = template.depth
    key = (
        micro_batches if context.order == "gpipe" else min(micro_batches, depth),
        tuple((s.device_class, s.tensor, s.depth, template.rows // s.width) for s in template.runs),
    )
    if key not in context.cuts:
        context.cuts[key] = _cuts(context, template, micro_batches)
    return context.cuts[key]


def _rooms(
    context: EstimateContext, stages: Sequence[tuple[StageRun, int]], micro_batches: int
) -> list[list[int]] | None:
    """Returns for every stage how far it can reach from each layer within its memory; None if all
    stages together cannot hold the model."""
    layers = len(context.costs.model.layers)
    schedule: ScheduleName = "gpipe" if context.order == "gpipe" else "1f1b"
    depth, rooms, at = len(stages), [], 0
    if depth > layers:
        return None
    for s, (run, rows) in enumerate(stages):
        held = in_flight(schedule, s, depth, micro_batches)
        rooms.append(_reach(context, run.device_class, run.tensor, rows, held))
        to = min(rooms[s][at], layers - (depth - 1 - s))
        if to <= at:
            return None
        at = to
    return rooms if at == layers else None


def _cuts(
    context: EstimateContext, template: PipelineTemplate, micro_batches: int
) -> tuple[int, ...] | None:
    stages, layers = template.stages, len(context.costs.model.layers)
    depth = len(stages)
    rooms = _rooms(context, stages, micro_batches)
    if rooms is None:
        return None
    sums = [prefixes(context, run.device_class, run.tensor, rows)[2] for run, rows in stages]

    def filled(limit: float) -> tuple[list[int], float] | None:
        """Returns cuts where every stage takes what it can within `limit`, and the longest time."""
        bounds, at, longest = [0], 0, 0.0
        for s, both in enumerate(sums):
            to = bisect_right(both, both[at] + limit) - 1
            to = min(to, rooms[s][at], layers - (depth - 1 - s))
            if to <= at:
                return None
            longest = max(longest, both[to] - both[at])
            bounds.append(to)
            at = to
        return (bounds, longest) if at == layers else None

    best = filled(max(both[-1] for both in sums) * 2)
    if best is None:
        return None
    low = 1 / sum(1 / both[-1] for both in sums)
    high = best[1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = filled(middle)
        if found is None:
            low = middle
        else:
            best, high = found, found[1]
    return tuple(best[0])


def estimate_template(
    context: EstimateContext, template: PipelineTemplate, micro_batches: int
) -> TemplateEstimate | None:
    """Returns the template with its best cuts and the seconds of its parts; None if none fit."""
    bounds = cuts(context, template, micro_batches)
    if bounds is None or not _tied_agree(context, template, bounds):
        return None
    alone, crowded, steps = [], [], []
    for (run, _), layers in zip(template.stages, pairwise(bounds), strict=True):
        kind = context.classes[run.device_class].kind
        steps.append(optimizer_of(context.costs, kind, layers, run.tensor))
        held = float(stage_parameters(context.costs.table.weights, layers, run.tensor))
        alone.append(reduction_seconds(context, run, held, crowded=False))
        crowded.append(reduction_seconds(context, run, held, crowded=True))
    return TemplateEstimate(
        template=template,
        bounds=bounds,
        prices=_prices(context, template, bounds),
        reduction=tuple(alone),
        crowded=tuple(crowded),
        optimizer=max(steps),
    )


def _tied_agree(
    context: EstimateContext, template: PipelineTemplate, bounds: tuple[int, ...]
) -> bool:
    """True if the tensor widths of all holders of a tied parameter divide the widest."""
    if len({run.tensor for run in template.runs}) == 1:
        return True
    held = [
        {
            run.tensor
            for (run, _), (a, b) in zip(template.stages, pairwise(bounds), strict=True)
            if any(a <= layer < b for layer in tied.layers)
        }
        for tied in context.costs.model.tied
    ]
    return all(map(divide_the_widest, held))


def _prices(
    context: EstimateContext, template: PipelineTemplate, bounds: tuple[int, ...]
) -> PipelinePrices:
    costs, stages = context.costs, template.stages
    forward, backward, inputs, weights, held = [], [], [], [], []
    for (run, rows), (a, b) in zip(stages, pairwise(bounds), strict=True):
        ahead, back, _ = prefixes(context, run.device_class, run.tensor, rows)
        group = context.classes[run.device_class].nodes[0][: run.tensor]
        first, later = split_prefix(costs, group, rows)
        forward.append(ahead[b] - ahead[a])
        backward.append(back[b] - back[a])
        inputs.append(first[b] - first[a])
        weights.append(later[b] - later[a])
        held.append(micro_batches_held(costs, group, rows, (a, b)))
    moved = [
        transfer_seconds(context, template, s, stages[s][0], stages[s + 1][0])
        for s in range(len(stages) - 1)
    ]
    found = PipelinePrices(forward, backward, inputs, weights, held, moved, moved, 0.0)
    return let_senders_wait(add_host(found, costs.system.instruction), costs.system.send_exposure)


def reduction_seconds(
    context: EstimateContext, run: StageRun, held: float, *, crowded: bool
) -> float:
    """Returns the seconds of a ring over a stage's replicas, whose ranks hold `held` parameters;
    the stages of a node share its network. `crowded`: other stages hold them too."""
    device_class, width, tensor = context.classes[run.device_class], run.width, run.tensor
    if width == 1 and not crowded:
        return 0.0
    size = held * reduced_width(context.costs)
    passed = 2.0 * size * (1.0 if crowded else (width - 1) / width)
    per_node = device_class.each // tensor // run.block
    inside = device_class.link_among(run.block * tensor)
    within = passed / inside.bandwidth
    if inside.shared:
        # Of the replicas in an island, one alone sends to the next island.
        within *= device_class.each // max(1, device_class.island // tensor)
    if width == run.block and not crowded:
        return within + 2 * (width - 1) * hop_latency(context.costs, inside)
    network = device_class.network
    across = flow_seconds(network, passed, tensor * per_node)
    latency = least_sum_steps(network, width) * hop_latency(context.costs, network)
    return max(within, across) + latency


def transfer_seconds(
    context: EstimateContext,
    template: PipelineTemplate,
    stage: int,
    here: StageRun,
    there: StageRun,
) -> float:
    """Returns the seconds of a usual activation to the next stage, all replicas at once."""
    source, target = (context.classes[here.device_class], context.classes[there.device_class])
    costs, fixed = context.costs, context.costs.system.boundary
    carried = template.rows * context.widest_cut
    if here == there and (inside := _link_inside(context, template, stage, here)):
        shared = here.block * here.tensor if inside.shared else 1
        return fixed + inside.latency + carried / here.width * shared / inside.bandwidth
    ends = [(source.network, here), (target.network, there)]
    seconds = max(
        flow_seconds(
            network, carried / s.width * copies(costs, s.tensor) / s.tensor, s.block * s.tensor
        )
        for network, s in ends
    )
    latency = max(network.latency for network, _ in ends)
    if source.site != target.site:
        late, bandwidth = uplinks_between(context, here.device_class, there.device_class)
        carried *= copies(costs, max(here.tensor, there.tensor))
        seconds, latency = max(seconds, carried / bandwidth), max(latency, late)
    return fixed + latency + seconds


def uplinks_between(context: EstimateContext, here: int, there: int) -> tuple[float, float]:
    """Returns latency and bandwidth of the way between the sites of two device classes: none and
    without limit where they stand at one site."""
    sites = context.classes[here].site, context.classes[there].site
    links = [link for site in sites if (link := context.costs.links.uplinks[site])]
    if sites[0] == sites[1] or not links:
        return 0.0, float("inf")
    latency = max(site_latency(context, site) for site in sites) + sum(u.latency for u in links)
    return latency, min(link.bandwidth for link in links)


def site_latency(context: EstimateContext, site: str) -> float:
    """Returns the latency of the network at a site."""
    return max(
        device_class.network.latency
        for device_class in context.classes
        if device_class.site == site
    )


def _link_inside(
    context: EstimateContext, template: PipelineTemplate, stage: int, run: StageRun
) -> Link | None:
    """Returns the link to the next stage of a run, inside an island or a node; None if that is on
    another node."""
    device_class, width = context.classes[run.device_class], run.block * run.tensor
    place = stage
    for each in template.runs:
        if each is run:
            break
        place -= each.depth
    if (place + 1) % (device_class.each // width) == 0:
        return None
    beside = device_class.island % width == 0 and (place + 1) % (device_class.island // width)
    return device_class.joined if beside else device_class.inside

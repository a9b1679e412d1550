"""Estimates a step in the best order of work that memory allows, in closed form.

No order beats these sums, and an order made for a pipeline comes within a few percent of them:
strategies are compared by what they can do, not by one order that may not suit them. Letters: S
stages, M micro-batches, F, B, I, W seconds of a forward, a whole backward and its two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshwright.cluster.topology import Resource
from meshwright.search.boundary_prices import boundary_prices
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import CandidatePipeline, must_recompute
from meshwright.search.costs import (
    Costs,
    distinct_replicas,
    group_capacity,
    group_prefix,
    split_prefix,
    stage_bytes,
)
from meshwright.search.reduction_estimate import Span, reduced


@dataclass(slots=True)
class _Prices:
    """A pipeline in seconds of one micro-batch, by stage and by cut."""

    micro_batches: int
    forward: list[float]
    backward: list[float]
    inputs: list[float]
    weights: list[float]
    held: list[int]
    """Micro-batches that a stage has memory for."""
    ahead: list[float]
    back: list[float]
    busiest: float
    """Seconds that a micro-batch occupies the busiest link, over all cuts."""


def best_order_seconds(
    costs: Costs, pipelines: Sequence[CandidatePipeline], limit: float = float("inf")
) -> float:
    """Seconds of a step in the best order that memory allows; where they must be `limit` or more,
    something in between."""
    after = after_pipelines(costs, pipelines)
    spans = [_spans(_prices(costs, pipeline)) for pipeline in pipelines]
    ends = max(span[0][1] for span in spans) + after
    return ends if ends >= limit else reduced(costs, pipelines, spans) + after


def _prices(costs: Costs, pipeline: CandidatePipeline) -> _Prices:
    found = _Prices(pipeline.micro_batches, [], [], [], [], [], [], [], 0.0)
    for s, (stage, (a, b)) in enumerate(
        zip(pipeline.stages, pairwise(pipeline.bounds), strict=True)
    ):
        repeats = must_recompute(costs, pipeline, s, "1f1b")
        replicas = distinct_replicas(costs, stage.groups, stage.rows)
        whole = [group_prefix(costs, group, rows) for group, rows in replicas]
        parts = [split_prefix(costs, group, rows) for group, rows in replicas]
        forward = max(f[b] - f[a] for f, _ in whole)
        again = forward if repeats else 0.0
        found.forward.append(forward)
        found.backward.append(max(g[b] - g[a] for _, g in whole) + again)
        found.inputs.append(max(i[b] - i[a] for i, _ in parts) + again)
        found.weights.append(max(w[b] - w[a] for _, w in parts))
        held = pipeline.micro_batches
        for group, rows in replicas:
            always, each = stage_bytes(costs, len(group), rows, recompute=repeats)
            room, size = group_capacity(costs, group) - always[a, b], each[a, b]
            held = min(held, max(1, int(room / size))) if size else held
        found.held.append(held)
    busy: dict[Resource, float] = {}
    for (here, there), cut in zip(pairwise(pipeline.stages), pipeline.bounds[1:-1], strict=True):
        ways = boundary_prices(costs, here, there)
        for seconds, way, table in zip(
            (found.ahead, found.back), ways, (costs.table.cut, costs.table.cut_gradient), strict=True
        ):
            size = float(table[cut]) * pipeline.rows
            seconds.append(way.seconds(size))
            for name, each in way.occupied:
                busy[name] = busy.get(name, 0.0) + each * size
    found.busiest = max(busy.values(), default=0.0)
    return found


def _spans(p: _Prices) -> list[Span]:
    """Returns begin and end of every stage's last backward, in the best of three ways to do the
    backwards: whole, in two parts, and in two parts while the pipeline drains."""
    drained = 1
    none = [0.0] * len(p.forward)
    ways = (
        _seconds(p, p.backward, none, 0),
        _seconds(p, p.inputs, p.weights, drained),
        _seconds(p, p.inputs, p.weights, p.micro_batches),
    )
    end = min(ways)
    back = p.backward if end == ways[0] else p.inputs
    spans = []
    for s, seconds in enumerate(back):
        spans.append((end - seconds, end))
        end -= seconds + (p.back[s] if s < len(p.back) else 0.0)
    return spans


def _seconds(p: _Prices, back: list[float], later: list[float], parted: int) -> float:
    """Seconds from the first forward to the last backward, the last `parted` backwards in two
    parts. For each stage,

        first forward arrives + max(its work, its round trips) + last gradient gets back

    where its work may go on while the gradient is on its way if backwards are in two parts, and as
    many micro-batches make the trip to the last stage and back at once as its memory holds.
    """
    depth, count = len(p.forward), p.micro_batches
    trips = [0.0] * depth
    trip = 0.0
    for s in reversed(range(depth)):
        trip += p.forward[s] + back[s]
        trips[s] = trip
        if s:
            trip += p.ahead[s - 1] + p.back[s - 1]
    worst, start, end = count * p.busiest, 0.0, later[0]
    for s in range(depth):
        load = p.forward[s] + p.backward[s]
        whole = count * load + parted * (back[s] + later[s] - p.backward[s])
        chain = whole - parted * later[s]
        rounds = (count - 1) // p.held[s] + 1
        worst = max(worst, start + max(whole, chain + end, rounds * trips[s] + end))
        if s < depth - 1:
            start += p.forward[s] + p.ahead[s]
            end += back[s] + p.back[s]
            slower = max(p.ahead[s], p.back[s])
            worst = max(worst, trips[0] + (count - 1) * slower)
    return worst

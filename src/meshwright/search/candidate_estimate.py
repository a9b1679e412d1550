"""Estimates the step of a candidate: of each of its pipelines, of the gradients that are summed
among their stages, and of what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from meshwright.cluster.topology import Resource
from meshwright.search.boundary_prices import boundary_prices
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import CandidatePipeline, must_recompute
from meshwright.search.costs import (
    Costs,
    distinct_replicas,
    group_prefix,
    micro_batches_held,
    split_prefix,
)
from meshwright.search.pipeline_seconds import Order, PipelinePrices, last_backwards
from meshwright.search.reduction_estimate import reduced


def candidate_seconds(
    costs: Costs,
    pipelines: Sequence[CandidatePipeline],
    order: Order,
    limit: float = float("inf"),
) -> float:
    """Seconds of a step; where they must be `limit` or more, something in between."""
    after = after_pipelines(costs, pipelines)
    spans = []
    for pipeline in pipelines:
        prices = pipeline_prices(costs, pipeline)
        spans.append(last_backwards(prices, pipeline.micro_batches, order))
        if spans[-1][0][1] + after >= limit:
            return spans[-1][0][1] + after
    return reduced(costs, pipelines, spans) + after


def exposed_reductions(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> float:
    """Seconds from the last backward, in the best order, to the end of all reductions."""
    spans = [
        last_backwards(pipeline_prices(costs, each), each.micro_batches, "best")
        for each in pipelines
    ]
    end = max(last for span in spans for _, last in span)
    return reduced(costs, pipelines, spans) - end


def pipeline_prices(costs: Costs, pipeline: CandidatePipeline) -> PipelinePrices:
    """What a micro-batch takes on every stage and across every cut."""
    forward, backward, inputs, weights, held = [], [], [], [], []
    for s, (stage, (a, b)) in enumerate(
        zip(pipeline.stages, pairwise(pipeline.bounds), strict=True)
    ):
        repeats = must_recompute(costs, pipeline, s, "1f1b")
        replicas = distinct_replicas(costs, stage.groups, stage.rows)
        whole = [group_prefix(costs, group, rows) for group, rows in replicas]
        parts = [split_prefix(costs, group, rows) for group, rows in replicas]
        ahead = max(f[b] - f[a] for f, _ in whole)
        again = ahead if repeats else 0.0
        forward.append(ahead)
        backward.append(max(g[b] - g[a] for _, g in whole) + again)
        inputs.append(max(i[b] - i[a] for i, _ in parts) + again)
        weights.append(max(w[b] - w[a] for _, w in parts))
        held.append(
            min(
                micro_batches_held(costs, group, rows, (a, b), recompute=repeats)
                for group, rows in replicas
            )
        )
    onward, returned, busiest = _cut_prices(costs, pipeline)
    return PipelinePrices(forward, backward, inputs, weights, held, onward, returned, busiest)


def _cut_prices(
    costs: Costs, pipeline: CandidatePipeline
) -> tuple[list[float], list[float], float]:
    """Seconds across every cut, onward and back, and on the link that is busiest with all cuts."""
    onward: list[float] = []
    returned: list[float] = []
    busy: dict[Resource, float] = {}
    for (here, there), cut in zip(pairwise(pipeline.stages), pipeline.bounds[1:-1], strict=True):
        ways = boundary_prices(costs, here, there)
        for seconds, way, table in zip(
            (onward, returned), ways, (costs.table.cut, costs.table.cut_gradient), strict=True
        ):
            size = float(table[cut]) * pipeline.rows
            seconds.append(way.seconds(size))
            for name, each in way.occupied:
                busy[name] = busy.get(name, 0.0) + each * size
    return onward, returned, max(busy.values(), default=0.0)

"""Estimates the step of a candidate: of each of its pipelines, of the gradients that are summed
among their stages, and of what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from meshwright.cluster.topology import Resource
from meshwright.search.boundary_prices import (
    BoundaryPrice,
    Crossing,
    boundary_prices,
    crowded_seconds,
    mean_period,
)
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import CandidatePipeline, must_recompute
from meshwright.search.costs import (
    Costs,
    distinct_replicas,
    group_prefix,
    micro_batches_held,
    remembered,
    split_prefix,
)
from meshwright.search.pipeline_seconds import (
    Order,
    PipelinePrices,
    add_host,
    last_backwards,
    let_senders_wait,
    pipeline_seconds,
)
from meshwright.search.reduction_estimate import reduced
from meshwright.search.stage_devices import StageDevices

NO_USE = (0, 0.0)
"""Messages of a micro-batch on an idle link, and the seconds that they occupy it."""

UNDELAYED, DELAYED = 0.4, 0.4
"""Messages of several cuts meet on a link that is in use for more than UNDELAYED of the step, in
any order: the step takes longer by DELAYED of the excess (`python benchmarks/closed_form.py`)."""


ROUNDING = 1e-9
"""Share by which a bound may exceed what it bounds because seconds are added in another order."""


def candidate_seconds(
    costs: Costs,
    pipelines: Sequence[CandidatePipeline],
    order: Order,
    limit: float = float("inf"),
) -> float:
    """Returns the seconds of a step; once they must be `limit` or more, a lower bound that is."""
    after = after_pipelines(costs, pipelines)
    every = all_pipeline_prices(costs, pipelines)
    spans = []
    for pipeline, prices in zip(pipelines, every, strict=True):
        spans.append(last_backwards(prices, pipeline.micro_batches, order))
        if spans[-1][0][1] + after >= limit:
            return spans[-1][0][1] + after
    seconds = reduced(costs, pipelines, spans) + after
    if order != "best":
        return seconds
    return seconds + DELAYED * max(0.0, crowded_link(pipelines, every) - UNDELAYED * seconds)


def compute_seconds(costs: Costs, pipeline: CandidatePipeline, order: Order) -> float:
    """Returns a bound of `candidate_seconds`: what the pipeline takes if nothing has to be sent."""
    prices = _stage_prices(costs, pipeline)
    prices.ahead = prices.back = [0.0] * (len(pipeline.stages) - 1)
    return (1 - ROUNDING) * pipeline_seconds(prices, pipeline.micro_batches, order)


def crowded_link(pipelines: Sequence[CandidatePipeline], every: Sequence[PipelinePrices]) -> float:
    """Returns the seconds of a step in which messages of several cuts or directions occupy the link
    that they occupy longest."""
    busy: dict[Resource, float] = {}
    users: dict[Resource, int] = {}
    for pipeline, prices in zip(pipelines, every, strict=True):
        for resource, (number, seconds) in prices.busy.items():
            busy[resource] = busy.get(resource, 0.0) + pipeline.micro_batches * seconds
            users[resource] = users.get(resource, 0) + number
    return max((busy[each] for each, number in users.items() if number > 1), default=0.0)


def pipeline_prices(costs: Costs, pipeline: CandidatePipeline) -> PipelinePrices:
    """Prices a micro-batch on every stage and across every cut of a pipeline that is alone."""
    return all_pipeline_prices(costs, (pipeline,))[0]


def all_pipeline_prices(
    costs: Costs, pipelines: Sequence[CandidatePipeline]
) -> list[PipelinePrices]:
    """Prices a micro-batch on every stage and across every cut of pipelines that share links."""
    every = [_stage_prices(costs, pipeline) for pipeline in pipelines]
    messages = [
        _messages(costs, pipeline, prices)
        for pipeline, prices in zip(pipelines, every, strict=True)
    ]
    seconds = iter(crowded_seconds([each for own in messages for pair in own for each in pair]))
    for prices, own in zip(every, messages, strict=True):
        busy: dict[Resource, tuple[int, float]] = {}
        for pair in own:
            prices.ahead.append(next(seconds))
            prices.back.append(next(seconds))
            for message in pair:
                for resource, each in message.occupied:
                    number, before = busy.get(resource, NO_USE)
                    busy[resource] = number + 1, before + each
        let_senders_wait(prices, costs.system.send_exposure)
        prices.busy = busy
        prices.busiest = max((each for _, each in busy.values()), default=0.0)
    return every


def _stage_prices(costs: Costs, pipeline: CandidatePipeline) -> PipelinePrices:
    """Prices a micro-batch on every stage; what it takes between them is left open."""
    depth = len(pipeline.stages)
    found = [
        _stage_price(costs, pipeline, s, (stage, layers, min(depth - s, pipeline.micro_batches)))
        for s, (stage, layers) in enumerate(
            zip(pipeline.stages, pairwise(pipeline.bounds), strict=True)
        )
    ]
    forward, backward, inputs, weights, held = map(list, zip(*found, strict=True))
    prices = PipelinePrices(forward, backward, inputs, weights, held, [], [], 0.0)
    return add_host(prices, costs.system.instruction)


StagePrice = tuple[float, float, float, float, int]
"""It holds the seconds of a forward, of a backward and of its two parts, and the micro-batches
held."""


def _stage_price(
    costs: Costs,
    pipeline: CandidatePipeline,
    s: int,
    facts: tuple[StageDevices, tuple[int, int], int],
) -> StagePrice:
    """Returns the price of a stage, given all that it depends on: its devices, its layers and the
    micro-batches that 1F1B would have it hold."""

    def priced() -> StagePrice:
        repeats = must_recompute(costs, pipeline, s, "1f1b")
        key = ("priced stage", *facts[:2], repeats)
        return remembered(costs, key, lambda: _priced_stage(costs, *facts[:2], repeats=repeats))

    return remembered(costs, ("stage price", *facts), priced)


def _priced_stage(
    costs: Costs, stage: StageDevices, layers: tuple[int, int], *, repeats: bool
) -> StagePrice:
    a, b = layers
    replicas = distinct_replicas(costs, stage.groups, stage.rows)
    whole = [group_prefix(costs, group, rows) for group, rows in replicas]
    parts = [split_prefix(costs, group, rows) for group, rows in replicas]
    ahead = max(f[b] - f[a] for f, _ in whole)
    again = ahead if repeats else 0.0
    held = [
        micro_batches_held(costs, group, rows, layers, recompute=repeats)
        for group, rows in replicas
    ]
    return (
        ahead,
        max(g[b] - g[a] for _, g in whole) + again,
        max(i[b] - i[a] for i, _ in parts) + again,
        max(w[b] - w[a] for _, w in parts),
        min(held),
    )


def _messages(
    costs: Costs, pipeline: CandidatePipeline, prices: PipelinePrices
) -> list[tuple[Crossing, Crossing]]:
    """Returns the messages across every cut, onward and back; their gathers are added to the work
    of the stages that receive them."""
    slowest = max(f + b for f, b in zip(prices.forward, prices.backward, strict=True))
    period = mean_period(slowest, len(prices.forward), pipeline.micro_batches)
    found = []
    for (here, there), cut in zip(pairwise(pipeline.stages), pipeline.bounds[1:-1], strict=True):
        key = ("messages", here, there, cut)
        ahead, back = remembered(costs, key, partial(_both_ways, costs, here, there, cut))
        found.append((Crossing(*ahead[:2], period), Crossing(*back[:2], period)))
        _gather(prices, len(found), ahead[2], back[2])
    return found


def _gather(prices: PipelinePrices, stage: int, ahead: float, back: float) -> None:
    """Adds the gathers at the cut before a stage: that of activations to its forward, that of
    gradients to the backward of the stage before."""
    if ahead:
        prices.forward[stage] += ahead
    if back:
        prices.backward[stage - 1] += back
        prices.inputs[stage - 1] += back


Message = tuple[float, Sequence[tuple[Resource, float]], float]
"""The seconds in which no byte of it moves, those on every resource if nothing else uses it, and
those in which its parts are gathered."""


def _both_ways(
    costs: Costs, here: StageDevices, there: StageDevices, cut: int
) -> tuple[Message, Message]:
    ahead, back = boundary_prices(costs, here, there)
    rows = sum(here.rows)
    return (
        _message(ahead, float(costs.table.cut[cut]) * rows),
        _message(back, float(costs.table.cut_gradient[cut]) * rows),
    )


def _message(way: BoundaryPrice, size: float) -> Message:
    if not size:
        return 0.0, (), 0.0
    occupied = [(name, each * size) for name, each in way.occupied]
    return way.latency, occupied, way.gather_seconds(size)

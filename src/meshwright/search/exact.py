"""Searches the whole space of a small input: every plan is simulated or ruled out by its bound.

The space: any devices left out; the others in pipelines, stages and tensor groups in every way that
keeps a tensor group inside a node; any layer cuts; any share of the batch for each pipeline, in any
number of equal micro-batches; any rows of a micro-batch for each replica; both schedules. Devices
of one type in one node are interchangeable, and so are nodes of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, pairwise, product
from math import comb, prod

from meshwright.plan.spec import ScheduleName
from meshwright.search.bounds import after_pipelines, pipeline_bound
from meshwright.search.candidate import CandidatePipeline, fits, tensor_widths_agree
from meshwright.search.candidate_estimate import pipeline_prices
from meshwright.search.costs import Costs
from meshwright.search.device_patterns import DevicePattern, concrete, device_patterns, strategies
from meshwright.search.incumbent import SAME
from meshwright.search.pipeline_seconds import pipeline_seconds
from meshwright.search.space import divisors
from meshwright.search.stage_devices import StageDevices
from meshwright.stopping import raise_if_stopped

LIMIT = 12_000
"""Pipelines (with their cuts, shares and rows) up to which a space is searched exhaustively."""


@dataclass(frozen=True, slots=True)
class Option:
    """Describes a fully decided pipeline, and the least seconds that it can take."""

    pipeline: CandidatePipeline
    seconds: float


@dataclass(frozen=True, slots=True)
class Prospect:
    """Describes a whole strategy that may be the best one."""

    seconds: float
    """Lower bound."""
    schedule: ScheduleName
    pipelines: tuple[CandidatePipeline, ...]


SecondsOf = Callable[[Costs, CandidatePipeline, ScheduleName], float]
"""What a pipeline takes at least in a schedule."""


@dataclass(slots=True)
class _SearchTables:
    """Holds the inputs of one exhaustive search, and what it has found so far."""

    costs: Costs
    limit: float
    """Seconds that a strategy must stay below."""
    pruned: Counter[str]
    seconds_of: SecondsOf
    options: dict[tuple[DevicePattern, ScheduleName], dict[int, list[Option]]] = field(
        default_factory=dict
    )


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to write a number as an ordered sum of positive ones."""
    for cuts in combinations(range(1, total), parts - 1):
        ends = (0, *cuts, total)
        yield tuple(b - a for a, b in pairwise(ends))


def space_size(costs: Costs) -> int:
    """Returns the number of pipelines that `prospects` would look at; counted no further than a
    little over LIMIT."""
    if len(costs.devices) > 6 or costs.job.global_batch > LIMIT:
        return LIMIT + 1
    layers, batch, total = len(costs.model.layers), costs.job.global_batch, 0

    @lru_cache
    def ways(widths: tuple[int, ...]) -> int:
        return sum(
            prod(comb(rows - 1, width - 1) for width in widths)
            for share in range(1, batch + 1)
            for rows in divisors(share)
        )

    for pattern in device_patterns(costs):
        widths = tuple(sorted(len(stage) for stage in pattern))
        total += comb(layers - 1, len(pattern) - 1) * ways(widths)
        if total > LIMIT:
            break
    return total


def prospects(
    costs: Costs,
    schedules: Sequence[ScheduleName],
    limit: float,
    pruned: Counter[str],
    out_of_time: Callable[[], bool] = lambda: False,
    seconds_of: SecondsOf = pipeline_bound,
) -> list[Prospect] | None:
    """Returns every strategy of the space whose lower bound is below `limit` seconds, lowest first;
    None if the time was up before all had been looked at."""
    tables = _SearchTables(costs, limit, pruned, seconds_of)
    found: list[Prospect] = []
    for strategy in strategies(costs):
        if out_of_time():
            return None
        for schedule in schedules:
            found += _of_strategy(tables, strategy, schedule, schedule == schedules[0])
    found.sort(key=lambda p: p.seconds)
    return found


def in_best_order(costs: Costs, pipeline: CandidatePipeline, _schedule: ScheduleName) -> float:
    """Returns the seconds of a pipeline in the best order of work, in closed form."""
    return pipeline_seconds(pipeline_prices(costs, pipeline), pipeline.micro_batches, "best")


def _of_strategy(
    tables: _SearchTables, strategy: tuple[DevicePattern, ...], schedule: ScheduleName, first: bool
) -> Iterator[Prospect]:
    placed = concrete(tables.costs, strategy)
    batch = tables.costs.job.global_batch
    offers = [_options(tables, pattern, schedule) for pattern in strategy]
    if any(not offer for offer in offers):
        return
    for shares in compositions(batch, len(strategy)):
        raise_if_stopped()
        for chosen in product(*(offer.get(s, ()) for offer, s in zip(offers, shares, strict=True))):
            pipelines = [
                CandidatePipeline(
                    tuple(
                        StageDevices(u, t.rows)
                        for u, t in zip(where, o.pipeline.stages, strict=True)
                    ),
                    o.pipeline.bounds,
                    o.pipeline.micro_batches,
                )
                for o, where in zip(chosen, placed, strict=True)
            ]
            alike = all(len(x.stages) == 1 or x.micro_batches == 1 for x in pipelines)
            if (alike and not first) or not tensor_widths_agree(tables.costs, pipelines):
                continue
            seconds = max(o.seconds for o in chosen) + after_pipelines(tables.costs, pipelines)
            if seconds < tables.limit * (1 - SAME):
                yield Prospect(seconds, schedule, tuple(pipelines))
            else:
                tables.pruned["lower bound above the best"] += 1


def _options(
    tables: _SearchTables, pattern: DevicePattern, schedule: ScheduleName
) -> dict[int, list[Option]]:
    """Returns the ways to fill a device pattern that fit and may be fast enough, by share."""
    key = (pattern, schedule)
    if key not in tables.options:
        found: dict[int, list[Option]] = {}
        for pipeline in _filled(tables.costs, pattern):
            raise_if_stopped()
            if not fits(tables.costs, pipeline, schedule):
                tables.pruned["does not fit in memory"] += 1
                continue
            seconds = tables.seconds_of(tables.costs, pipeline, schedule)
            if seconds < tables.limit * (1 - SAME):
                found.setdefault(pipeline.share, []).append(Option(pipeline, seconds))
            else:
                tables.pruned["lower bound above the best"] += 1
        tables.options[key] = found
    return tables.options[key]


def _filled(costs: Costs, pattern: DevicePattern) -> Iterator[CandidatePipeline]:
    """Fills a device pattern with every number of micro-batches, rows and cuts."""
    (placed,) = concrete(costs, (pattern,))
    batch, layers = costs.job.global_batch, len(costs.model.layers)
    for share in range(1, batch + 1):
        for rows in divisors(share):
            for split in product(*(compositions(rows, len(groups)) for groups in placed)):
                stages = tuple(StageDevices(u, r) for u, r in zip(placed, split, strict=True))
                for sizes in combinations(range(1, layers), len(stages) - 1):
                    pipeline = CandidatePipeline(stages, (0, *sizes, layers), share // rows)
                    if tensor_widths_agree(costs, (pipeline,)):
                        yield pipeline

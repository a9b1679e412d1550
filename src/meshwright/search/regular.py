"""Finds the best regular pipeline: equally wide stages on devices in a row, as people plan them.

It is the first plan of a search, what a climb starts from beside others, and what shows by how much
memory is missing where nothing fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, group_kind
from meshwright.search.hill_climb import FITTING, FITTING_STAGE, LocalSearch, rate
from meshwright.search.incumbent import Progress, Strategy
from meshwright.search.layer_partition import (
    Stages,
    apportioned,
    fluid_rate,
    least_excess,
    recut,
)
from meshwright.search.space import (
    DeviceRow,
    divisors,
    is_large,
    rows_by_type,
    rows_in_order,
)
from meshwright.search.stage_devices import StageDevices
from meshwright.search.template_builds import MOST_CELLS
from meshwright.stopping import raise_if_stopped

MOST = 4_000
"""Regular pipelines of an input that are looked at, evenly drawn from all."""

MOST_GROUPS = 200_000
"""Tensor groups in all regular pipelines that are looked at where nothing else has fitted."""

ALIKE = 6
"""Regular pipelines of one depth and tensor width that get cuts, unless none of any has fitted."""

PROMISING = 20
"""Steps (about a microsecond each) that it takes to write a regular pipeline down and to say what
it promises."""

UNTIL_ONE_FITS = 500
"""Regular pipelines that get cuts as long as none fits: the most promising, and as many of the
others, evenly drawn."""

AT_LEAST = 64
"""Regular pipelines that get cuts however short the time is, unless one of them fits."""


@dataclass(frozen=True, slots=True)
class RegularPipeline:
    """Describes a regular pipeline of which everything is decided but its cuts."""

    stages: tuple[StageDevices, ...]
    micro_batches: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Returns its data width, tensor width and number of stages."""
        groups = self.stages[0].groups
        return len(groups), len(groups[0]), len(self.stages)


@dataclass(frozen=True, slots=True)
class Explored:
    """Holds what is known of the regular pipelines of an input."""

    best: Strategy | None = None
    """The fastest that fits, in closed form."""
    misfits: tuple[RegularPipeline, ...] = ()
    """Those that fit with no cuts, most promising first."""


def regular_pipelines(costs: Costs, most: int = MOST) -> list[RegularPipeline]:
    """Returns the regular pipelines on devices sorted by type or in cluster order, with every size
    of micro-batches; at most about so many of them, evenly drawn."""
    batch = costs.job.global_batch
    shapes = [
        (groups, depth, width, across, rows)
        for groups in _rows(costs)
        for depth, width in _depths(costs, groups)
        for across in (False, True)[: 1 + (width > 1 and depth > 1)]
        for rows in divisors(batch)
        if rows >= width
    ]
    found = []
    for groups, depth, width, across, rows in shapes[:: -(-len(shapes) // most)]:
        raise_if_stopped()
        stages = divided(costs, groups, depth, width, across=across)
        devices = tuple(apportioned(costs, own, rows) for own in stages)
        found.append(RegularPipeline(devices, batch // rows))
    return list(dict.fromkeys(found))


def _rows(costs: Costs) -> Iterator[DeviceRow]:
    """Yields the rows of devices; of very many devices only those in cluster order."""
    sorted_rows = () if is_large(costs) else rows_by_type(costs)
    rows = (*sorted_rows, *rows_in_order(costs))
    return (row for row in dict.fromkeys(rows) if row)


def _depths(costs: Costs, groups: DeviceRow) -> Iterator[tuple[int, int]]:
    """Yields numbers of stages and of replicas of each that use as many of the devices as can be:
    where one more stage or replica could be made of what is left, there are none."""
    number, layers = len(groups), len(costs.model.layers)
    deepest = max(1, min(number, layers, MOST_CELLS // layers**2))
    for depth in range(1, deepest + 1):
        width = number // depth
        if depth == number // width or depth == deepest:
            yield depth, min(width, costs.job.global_batch)


def divided(costs: Costs, groups: DeviceRow, depth: int, width: int, *, across: bool) -> Stages:
    """Divides tensor groups into stages. Replicas of a stage are neighbours, or (`across`) stages
    are, among groups of one kind where each of their runs makes whole stages."""
    groups = groups[: width * depth]
    if not across:
        return tuple(groups[s * width : (s + 1) * width] for s in range(depth))
    runs = [tuple(own) for _, own in groupby(groups, lambda group: group_kind(costs, group))]
    if any(len(run) % width for run in runs):
        runs = [groups]
    depths = [len(run) // width for run in runs]
    return tuple(run[s::each] for run, each in zip(runs, depths, strict=True) for s in range(each))


def promise(costs: Costs, pipeline: RegularPipeline) -> float:
    """Returns the seconds of a pipeline if its stages were equally fast, and nothing took time but
    their work."""
    turns = pipeline.micro_batches + len(pipeline.stages) - 1
    return turns / fluid_rate(costs, pipeline.stages)


def explore(search: LocalSearch, tell: Progress) -> Explored:
    """Returns the best regular pipeline in closed form, of those that promise most.

    As many are looked at as the search may take steps; but until one fits, UNTIL_ONE_FITS of them
    and some of the others, and once it is out of time, AT_LEAST of them.
    """
    costs, incumbent = search.incumbent.costs, search.incumbent
    found: dict[Strategy, float] = {}
    misfits: list[RegularPipeline] = []
    alike: Counter[object] = Counter()
    queue = _most_promising(costs)
    every_so_many = -(-len(queue) // UNTIL_ONE_FITS)
    search.left -= PROMISING * len(queue)
    for done, pipeline in enumerate(queue):
        enough = found or (done >= AT_LEAST and incumbent.out_of_time)
        if enough and search.out_of_budget:
            incumbent.pruned["regular pipelines that promise less"] += len(queue) - done
            break
        if done % 64 == 0:
            tell("searching", done, len(queue))
        raise_if_stopped()
        build = pipeline.widths[1:]
        left_out = not found and done > UNTIL_ONE_FITS and done % every_so_many
        if left_out or alike[build] == ALIKE:
            incumbent.pruned["regular pipelines that promise less"] += 1
            continue
        strategy = _fitted(search, pipeline)
        if strategy is None:
            incumbent.pruned["does not fit in memory"] += 1
            misfits.append(pipeline)
        else:
            alike[build] += 1
            found[strategy] = rate(search, strategy)
    tell("searching", len(queue), len(queue))
    best = min(found, key=found.__getitem__, default=None)
    return Explored(best, tuple(misfits))


def _most_promising(costs: Costs) -> list[RegularPipeline]:
    every = regular_pipelines(costs)
    promised = [promise(costs, pipeline) for pipeline in every]
    return [every[i] for i in sorted(range(len(every)), key=promised.__getitem__)]


def _fitted(search: LocalSearch, pipeline: RegularPipeline) -> Strategy | None:
    """Returns the pipeline with its best cuts, and counts the steps; None if it does not fit."""
    schedule = search.schedules[0]
    search.left -= FITTING + FITTING_STAGE * len(pipeline.stages)
    fitted = with_best_cuts(search.incumbent.costs, pipeline, schedule)
    return (schedule, (fitted,)) if fitted else None


def with_best_cuts(
    costs: Costs, pipeline: RegularPipeline, schedule: ScheduleName
) -> CandidatePipeline | None:
    """Returns the pipeline with its best cuts (see `recut`); None if it does not fit."""
    fitted = recut(costs, pipeline.stages, pipeline.micro_batches, schedule)
    return fitted.pipeline if fitted else None


def nearest_misfits(
    costs: Costs, pipelines: Sequence[RegularPipeline]
) -> Iterator[CandidatePipeline]:
    """Yields pipelines that do not fit with the cuts that exceed memory least, in 1F1B."""
    for pipeline in pipelines:
        raise_if_stopped()
        yield least_excess(costs, pipeline.stages, pipeline.micro_batches, "1f1b")


def sample(costs: Costs) -> list[RegularPipeline]:
    """Returns a few of the regular pipelines of very many devices: they show by how much nothing
    fits."""
    return regular_pipelines(costs, max(8, MOST_GROUPS // len(costs.devices)))

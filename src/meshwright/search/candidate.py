"""Describes a candidate plan: pipelines whose stages may differ in width, and replicas in rows.

A unit is a group of devices that share every layer by tensor parallelism. The devices of a stage
are units, each with its rows of every micro-batch. Letters: S stages, L layers, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from meshwright.model.spec import structure_fingerprint
from meshwright.plan.spec import Pipeline, Plan, PlanInput, ScheduleName, Stage
from meshwright.program.schedules import in_flight
from meshwright.search.costs import Costs, distinct_replicas, stage_bytes, unit_capacity

Unit = tuple[str, ...]
"""Names of devices that share every layer by tensor parallelism."""


@dataclass(frozen=True, slots=True)
class StageDevices:
    """The devices of one stage."""

    units: tuple[Unit, ...]
    rows: tuple[int, ...]
    """Of every micro-batch, by unit."""


@dataclass(frozen=True, slots=True)
class CandidatePipeline:
    """One pipeline."""

    teams: tuple[StageDevices, ...]
    bounds: tuple[int, ...]
    """S + 1 layer indices."""
    micro_batches: int

    @property
    def rows(self) -> int:
        """Returns the rows of one micro-batch, over all units of a stage."""
        return sum(self.teams[0].rows)

    @property
    def share(self) -> int:
        """Rows of the global batch."""
        return self.rows * self.micro_batches


def as_pipeline(costs: Costs, line: CandidatePipeline, schedule: ScheduleName) -> Pipeline:
    """Returns the pipeline as plans write it: equal rows are not listed, and stages recompute that
    do not fit otherwise."""
    stages = tuple(
        Stage(
            layers=layers,
            devices=team.units,
            rows=None if len(set(team.rows)) == 1 else team.rows,
            recompute=must_recompute(costs, line, s, schedule),
        )
        for s, (layers, team) in enumerate(zip(pairwise(line.bounds), line.teams, strict=True))
    )
    return Pipeline(micro_batches=line.micro_batches, rows=line.rows, stages=stages)


def line_of(pipeline: Pipeline) -> CandidatePipeline:
    """The inverse of `as_pipeline`."""
    teams = tuple(
        StageDevices(s.devices, s.rows or (pipeline.rows // len(s.devices),) * len(s.devices))
        for s in pipeline.stages
    )
    bounds = (0, *(stage.layers[1] for stage in pipeline.stages))
    return CandidatePipeline(teams, bounds, pipeline.micro_batches)


def plan_of(
    costs: Costs,
    lines: Sequence[CandidatePipeline],
    schedule: ScheduleName,
    cluster_print: str = "",
) -> Plan:
    """The plan of these pipelines, without a prediction."""
    used = {name for line in lines for team in line.teams for unit in team.units for name in unit}
    return Plan(
        name=_name(lines),
        model=PlanInput(name=costs.model.name, fingerprint=structure_fingerprint(costs.model)),
        cluster=PlanInput(name=costs.cluster.name, fingerprint=cluster_print),
        job=costs.job,
        schedule=schedule,
        devices=tuple(name for name in costs.devices if name in used),
        pipelines=tuple(as_pipeline(costs, line, schedule) for line in lines),
    )


def _name(lines: Sequence[CandidatePipeline]) -> str:
    return "+".join(_line_name(line) for line in lines)


def _line_name(line: CandidatePipeline) -> str:
    """`dp2-tp1-pp3`; widths that change from stage to stage are listed: `dp2.1-tp1-pp2`."""
    data = ".".join(dict.fromkeys(str(len(team.units)) for team in line.teams))
    tensor = ".".join(dict.fromkeys(str(len(team.units[0])) for team in line.teams))
    return f"dp{data}-tp{tensor}-pp{len(line.teams)}"


def line_label(line: CandidatePipeline) -> str:
    """`dp2-tp1-pp2 [7|3] 4x8 rows 3,1`: layers, micro-batches, rows where they are not equal."""
    words = [_line_name(line)]
    if len(line.teams) > 1:
        words.append("[" + "|".join(str(b - a) for a, b in pairwise(line.bounds)) + "]")
    words.append(f"{line.micro_batches}x{line.rows}")
    shares = {team.rows for team in line.teams if len(set(team.rows)) > 1}
    words += ["rows " + ",".join(map(str, rows)) for rows in sorted(shares) if len(rows) <= 8]
    return " ".join(words)


def lines_label(
    lines: Sequence[CandidatePipeline], schedule: ScheduleName, missing: int = 0
) -> str:
    """One line that tells a strategy from its neighbours."""
    text = " + ".join(line_label(line) for line in lines)
    if any(len(line.teams) > 1 for line in lines):
        text += f" {schedule}"
    return text + (f" without {missing} devices" if missing else "")


def fits(costs: Costs, line: CandidatePipeline, schedule: ScheduleName) -> bool:
    """True if every device of every stage holds what it must, recomputing if need be."""
    may = costs.again is not None
    return all(
        stage_fits(costs, line, s, schedule)
        or (may and stage_fits(costs, line, s, schedule, again=True))
        for s in range(len(line.teams))
    )


def stage_fits(
    costs: Costs, line: CandidatePipeline, s: int, schedule: ScheduleName, *, again: bool = False
) -> bool:
    """True if every device of a stage holds what it must; `again`: if it recomputes."""
    team, a, b = line.teams[s], line.bounds[s], line.bounds[s + 1]
    held = in_flight(schedule, s, len(line.teams), line.micro_batches)
    for unit, rows in distinct_replicas(costs, team.units, team.rows):
        always, each = stage_bytes(costs, len(unit), rows, again=again)
        if always[a, b] + each[a, b] * held > unit_capacity(costs, unit):
            return False
    return True


def must_recompute(costs: Costs, line: CandidatePipeline, s: int, schedule: ScheduleName) -> bool:
    """True if a stage does not fit without recomputation, and may recompute. Where it fits, it
    would only take longer."""
    return costs.again is not None and not stage_fits(costs, line, s, schedule)


def moves(source: StageDevices, target: StageDevices) -> Iterator[tuple[int, int, int]]:
    """(source unit, target unit, rows) of one micro-batch across a cut, in order; lazily."""
    ends, goals = accumulate(source.rows), accumulate(target.rows)
    end, goal = next(ends, None), next(goals, None)
    i = j = at = 0
    while end is not None and goal is not None:
        to = min(end, goal)
        yield i, j, to - at
        at = to
        if end == to:
            i, end = i + 1, next(ends, None)
        if goal == to:
            j, goal = j + 1, next(goals, None)


def tensor_widths_agree(costs: Costs, lines: Sequence[CandidatePipeline]) -> bool:
    """True if all holders of a layer, and of what it shares, have one tensor width that divides
    it."""
    width: dict[int, int] = {}
    layers = costs.model.layers
    for line in lines:
        for team, (a, b) in zip(line.teams, pairwise(line.bounds), strict=True):
            tensor = len(team.units[0])
            for layer in range(a, b):
                units = layers[layer].along("tensor").units
                if units % tensor or width.setdefault(layer, tensor) != tensor:
                    return False
    return all(len({width[layer] for layer in tied.layers}) <= 1 for tied in costs.model.tied)

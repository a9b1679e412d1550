"""Describes a candidate plan: pipelines whose stages may differ in width, and replicas in rows.

A tensor group is a group of devices that share every layer by tensor parallelism. The devices of a
stage are tensor groups, each with its rows of every micro-batch. Letters: S stages, L layers, M
micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from meshwright.model.spec import structure_fingerprint
from meshwright.plan.spec import Pipeline, Plan, PlanInput, ScheduleName, Stage
from meshwright.program.schedules import in_flight
from meshwright.search.boundary_prices import boundary_kind
from meshwright.search.costs import (
    Costs,
    distinct_replicas,
    group_capacity,
    remembered,
    stage_bytes,
)
from meshwright.search.stage_devices import StageDevices


@dataclass(frozen=True, slots=True)
class CandidatePipeline:
    """Describes one pipeline of a strategy; it knows its hash, as its stages do."""

    stages: tuple[StageDevices, ...]
    bounds: tuple[int, ...]
    """S + 1 layer indices."""
    micro_batches: int
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.stages, self.bounds, self.micro_batches)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def devices(self) -> list[str]:
        """Returns the names of all devices."""
        return [name for stage in self.stages for group in stage.groups for name in group]

    @property
    def rows(self) -> int:
        """Returns the rows of one micro-batch, over all tensor groups of a stage."""
        return sum(self.stages[0].rows)

    @property
    def share(self) -> int:
        """Returns the rows of the global batch."""
        return self.rows * self.micro_batches


def micro_batch_sizes(pipelines: Sequence[CandidatePipeline]) -> tuple[tuple[int, int], ...]:
    """Returns the number of micro-batches and their rows, of every pipeline."""
    return tuple((each.micro_batches, each.rows) for each in pipelines)


def as_pipeline(costs: Costs, pipeline: CandidatePipeline, schedule: ScheduleName) -> Pipeline:
    """Returns the pipeline as plans write it: equal rows are not listed, stages recompute that do
    not fit otherwise, and cuts are of their quickest kind."""
    stages = tuple(
        Stage(
            layers=layers,
            devices=stage.groups,
            rows=None if len(set(stage.rows)) == 1 else stage.rows,
            boundary=boundary_kind(costs, pipeline.stages[s - 1], stage) if s else None,
            recompute=must_recompute(costs, pipeline, s, schedule),
        )
        for s, (layers, stage) in enumerate(
            zip(pairwise(pipeline.bounds), pipeline.stages, strict=True)
        )
    )
    return Pipeline(micro_batches=pipeline.micro_batches, rows=pipeline.rows, stages=stages)


def candidate_of(pipeline: Pipeline) -> CandidatePipeline:
    """Returns the candidate of a pipeline: the inverse of `as_pipeline`."""
    stages = tuple(
        StageDevices(s.devices, s.rows or (pipeline.rows // len(s.devices),) * len(s.devices))
        for s in pipeline.stages
    )
    bounds = (0, *(stage.layers[1] for stage in pipeline.stages))
    return CandidatePipeline(stages, bounds, pipeline.micro_batches)


def plan_of(
    costs: Costs,
    pipelines: Sequence[CandidatePipeline],
    schedule: ScheduleName,
    cluster_print: str = "",
) -> Plan:
    """Returns the plan of these pipelines, without a prediction."""
    used = {name for pipeline in pipelines for name in pipeline.devices}
    return Plan(
        name=_name(pipelines),
        model=PlanInput(name=costs.model.name, fingerprint=structure_fingerprint(costs.model)),
        cluster=PlanInput(name=costs.cluster.name, fingerprint=cluster_print),
        job=costs.job,
        schedule=schedule,
        devices=tuple(name for name in costs.devices if name in used),
        pipelines=tuple(as_pipeline(costs, pipeline, schedule) for pipeline in pipelines),
    )


def _name(pipelines: Sequence[CandidatePipeline]) -> str:
    return "+".join(_pipeline_name(pipeline) for pipeline in pipelines)


def _pipeline_name(pipeline: CandidatePipeline) -> str:
    """Returns a name such as `dp2-tp1-pp3`; widths that change from stage to stage are listed:
    `dp2.1-tp1-pp2`."""
    data = ".".join(dict.fromkeys(str(len(stage.groups)) for stage in pipeline.stages))
    tensor = ".".join(dict.fromkeys(str(len(stage.groups[0])) for stage in pipeline.stages))
    return f"dp{data}-tp{tensor}-pp{len(pipeline.stages)}"


def pipeline_label(pipeline: CandidatePipeline) -> str:
    """Returns a label such as `dp2-tp1-pp2 [7|3] 4x8 rows 3,1`: layers, micro-batches, rows where
    they are not equal."""
    words = [_pipeline_name(pipeline)]
    if len(pipeline.stages) > 1:
        words.append("[" + "|".join(str(b - a) for a, b in pairwise(pipeline.bounds)) + "]")
    words.append(f"{pipeline.micro_batches}x{pipeline.rows}")
    shares = {stage.rows for stage in pipeline.stages if len(set(stage.rows)) > 1}
    words += ["rows " + ",".join(map(str, rows)) for rows in sorted(shares) if len(rows) <= 8]
    return " ".join(words)


def strategy_label(
    costs: Costs, pipelines: Sequence[CandidatePipeline], schedule: ScheduleName
) -> str:
    """Returns one line that tells a strategy from its neighbours."""
    text = " + ".join(pipeline_label(pipeline) for pipeline in pipelines)
    if any(len(pipeline.stages) > 1 for pipeline in pipelines):
        text += f" {schedule}"
    missing = len(costs.devices) - sum(len(pipeline.devices) for pipeline in pipelines)
    return text + (f" without {missing} devices" if missing else "")


def excess_bytes(costs: Costs, pipeline: CandidatePipeline, schedule: ScheduleName) -> float:
    """Returns the bytes by which the fullest device of all exceeds its memory, recomputing if need
    be; what is left of it, below zero, if the pipeline fits."""
    may = costs.recomputed is not None
    worst = []
    for s in range(len(pipeline.stages)):
        excess = _stage_excess(costs, pipeline, s, schedule, recompute=False)
        if excess > 0 and may:
            excess = _stage_excess(costs, pipeline, s, schedule, recompute=True)
        worst.append(excess)
    return max(worst)


def fits(costs: Costs, pipeline: CandidatePipeline, schedule: ScheduleName) -> bool:
    """True if every device of every stage holds what it must, recomputing if need be."""
    may = costs.recomputed is not None
    return all(
        stage_fits(costs, pipeline, s, schedule)
        or (may and stage_fits(costs, pipeline, s, schedule, recompute=True))
        for s in range(len(pipeline.stages))
    )


def stage_fits(
    costs: Costs,
    pipeline: CandidatePipeline,
    s: int,
    schedule: ScheduleName,
    *,
    recompute: bool = False,
) -> bool:
    """True if every device of a stage holds what it must; `recompute`: if the stage recomputes."""
    return _stage_excess(costs, pipeline, s, schedule, recompute=recompute) <= 0


def _stage_excess(
    costs: Costs, pipeline: CandidatePipeline, s: int, schedule: ScheduleName, *, recompute: bool
) -> float:
    """Returns the bytes by which the fullest device of a stage exceeds its memory."""
    stage, layers = pipeline.stages[s], (pipeline.bounds[s], pipeline.bounds[s + 1])
    held = in_flight(schedule, s, len(pipeline.stages), pipeline.micro_batches)
    key = ("excess", stage, layers, held, recompute)
    return remembered(costs, key, lambda: _excess(costs, stage, layers, held, recompute=recompute))


def _excess(
    costs: Costs, stage: StageDevices, layers: tuple[int, int], held: int, *, recompute: bool
) -> float:
    worst = float("-inf")
    for group, rows in distinct_replicas(costs, stage.groups, stage.rows):
        always, each = stage_bytes(costs, len(group), rows, recompute=recompute)
        need = float(always[layers] + each[layers] * held)
        worst = max(worst, need - group_capacity(costs, group))
    return worst


def must_recompute(
    costs: Costs, pipeline: CandidatePipeline, s: int, schedule: ScheduleName
) -> bool:
    """True if a stage does not fit without recomputation, and may recompute. Where it fits, it
    would only take longer."""
    return costs.recomputed is not None and not stage_fits(costs, pipeline, s, schedule)


def tensor_widths(pipelines: Sequence[CandidatePipeline]) -> dict[int, set[int]]:
    """Returns the tensor widths of the holders of each layer."""
    held: dict[int, set[int]] = {}
    for pipeline in pipelines:
        for stage, (a, b) in zip(pipeline.stages, pairwise(pipeline.bounds), strict=True):
            for layer in range(a, b):
                held.setdefault(layer, set()).add(len(stage.groups[0]))
    return held


def tensor_widths_agree(costs: Costs, pipelines: Sequence[CandidatePipeline]) -> bool:
    """True if the tensor widths of all holders of a layer, and of what it shares, divide the widest
    of them, and that one the layer: a narrow replica holds whole shares of the wide ones."""
    layers = costs.model.layers
    widths = {len(stage.groups[0]) for pipeline in pipelines for stage in pipeline.stages}
    if len(widths) == 1:
        (width,) = widths
        key = ("divided by", width)
        every = (layer.along("tensor").units % width == 0 for layer in layers)
        return remembered(costs, key, lambda: all(every))
    held = tensor_widths(pipelines)
    if any(layers[layer].along("tensor").units % max(own) for layer, own in held.items()):
        return False
    tied = [set[int]().union(*(held[layer] for layer in each.layers)) for each in costs.model.tied]
    return all(divide_the_widest(own) for own in (*held.values(), *tied))


def divide_the_widest(widths: Collection[int]) -> bool:
    """Returns True if the widest of some tensor widths is a multiple of each."""
    return len(widths) < 2 or all(max(widths) % width == 0 for width in widths)

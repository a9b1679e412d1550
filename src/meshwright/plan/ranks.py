"""Assigns the ranks of a plan: the stages that each process holds, and the rows of the batch that
it works on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from meshwright.plan.mesh import (
    AXES,
    Axis,
    Coordinates,
    Mesh,
    mesh_of,
    mesh_of_replicas,
    stacked,
    widths_text,
)
from meshwright.plan.spec import BoundaryKind, Job, Pipeline, Plan, ScheduleName, Stage
from meshwright.records import record
from meshwright.techniques import provided


@record
class RankPlacement:
    """Places one rank in one stage. A rank has a placement in every stage that it holds."""

    rank: int
    device: str
    pipeline: int
    stage: int
    """Number of the stage, counted over all pipelines in order."""
    coordinates: Coordinates
    """Its index along each axis of the stage's mesh."""
    widths: Coordinates
    """The width of the mesh along each axis, at its replica."""
    rows: tuple[int, int]
    """Rows of every micro-batch that this rank works on: [first, last)."""

    def index(self, axis: Axis) -> int:
        """Returns its index along an axis."""
        return self.coordinates[AXES.index(axis)]

    def width(self, axis: Axis) -> int:
        """Returns the number of ranks along an axis, itself included."""
        return self.widths[AXES.index(axis)]


@record
class StagePlacement:
    """Holds one stage with the placement of each of its ranks, and what instructions need to know
    of it."""

    number: int
    pipeline: int
    is_first: bool
    is_last: bool
    position: int
    """Index of its pipeline rank, from 0. Stages of one position are held by the
    same ranks, in the same mesh (virtual stages); without these it is the stage's index in its
    pipeline."""
    layers: tuple[int, int]
    plan_stage: Stage
    """The stage as the plan describes it."""
    mesh: Mesh[RankPlacement]
    """The placements of its ranks, in the order of the stage's devices."""
    boundary: BoundaryKind = "direct"
    """How tensors cross the cut between the previous stage and this one, in both directions."""


@record
class RankView:
    """Gives techniques what they may know of one rank of a plan."""

    stages: tuple[StagePlacement, ...]
    """The stages that the rank holds, in layer order."""
    placement: RankPlacement
    """Its placement in the first of them."""


def row_intervals(stage: Stage, rows: int) -> tuple[tuple[int, int], ...]:
    """Returns the rows [first, last) of each replica in a micro-batch of `rows` rows."""
    replicas = len(stage.devices)
    shares = stage.rows or (rows // replicas,) * replicas
    ends = tuple(accumulate(shares))
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def stage_placements(plan: Plan) -> tuple[StagePlacement, ...]:
    """Returns every stage of every pipeline, numbered in order."""
    # Plans that differ in their schedule and micro-batches alone share what they place.
    pipelines = tuple(replace(each, micro_batches=1, actions=None) for each in plan.pipelines)
    return _placements(plan.devices, pipelines)


@lru_cache(maxsize=4)  # a plan is compiled, priced and weighed one after the other
def _placements(
    devices: tuple[str, ...], pipelines: tuple[Pipeline, ...]
) -> tuple[StagePlacement, ...]:
    found: list[StagePlacement] = []
    for p, pipeline in enumerate(pipelines):
        position_of = {s: g for g, held in enumerate(stage_layout(pipeline)) for s in held}
        for s, stage in enumerate(pipeline.stages):
            number, intervals = len(found), row_intervals(stage, pipeline.rows)
            found.append(
                StagePlacement(
                    number=number,
                    pipeline=p,
                    is_first=s == 0,
                    is_last=s == len(pipeline.stages) - 1,
                    position=position_of[s],
                    layers=stage.layers,
                    boundary=stage.boundary or "direct",
                    plan_stage=stage,
                    mesh=_placed_mesh(stage.devices, intervals, number, p, devices),
                )
            )
    return tuple(found)


@lru_cache(maxsize=4)
def _rank_of(devices: tuple[str, ...]) -> Mapping[str, int]:
    return {device: rank for rank, device in enumerate(devices)}


@lru_cache(maxsize=64)  # plans whose stages differ in their layers alone share what they place
def _placed_mesh(
    replicas: tuple[tuple[str, ...], ...],
    intervals: tuple[tuple[int, int], ...],
    number: int,
    pipeline: int,
    devices: tuple[str, ...],
) -> Mesh[RankPlacement]:
    """Returns the mesh of a stage with the placement of each rank, given the devices and the rows
    of its replicas."""
    rank_of, mesh = _rank_of(devices), mesh_of_replicas(replicas)
    widths = [(len(mesh.inner_widths), *own) for own in mesh.inner_widths]
    members = (
        RankPlacement(
            rank=rank_of[device],
            device=device,
            pipeline=pipeline,
            stage=number,
            coordinates=at,
            widths=widths[at[0]],
            rows=intervals[at[0]],
        )
        for device, at in zip(mesh.members, mesh.coordinates, strict=True)
    )
    return Mesh(members=tuple(members), inner_widths=mesh.inner_widths)


def holders_of(stages: Sequence[StagePlacement], layers: Sequence[int]) -> Mesh[int]:
    """Returns the mesh of all ranks that hold any of the layers: the replicas of all their
    stages."""
    held = (s for s in stages if any(s.layers[0] <= layer < s.layers[1] for layer in layers))
    return stacked(rank_mesh(stage) for stage in held)


def rank_mesh(stage: StagePlacement) -> Mesh[int]:
    """Returns the ranks of a stage on its mesh."""
    ranks = tuple(placement.rank for placement in stage.mesh.members)
    return Mesh(members=ranks, inner_widths=stage.mesh.inner_widths)


def same_ranks(one: StagePlacement, other: StagePlacement) -> bool:
    """True if the same ranks hold both stages, so that no tensor moves between them."""
    return (one.pipeline, one.position) == (other.pipeline, other.position)


def uses_tensor_parallelism(plan: Plan) -> bool:
    """True if any layer is divided over several tensor ranks."""
    return any(mesh_of(s).width("tensor") > 1 for p in plan.pipelines for s in p.stages)


def placements_of(stages: Sequence[StagePlacement], rank: int) -> tuple[RankPlacement, ...]:
    """Returns a rank's placements in stage order; there are several if the schedule has virtual
    stages."""
    placements = (placement for stage in stages for placement in stage.mesh.members)
    return tuple(placement for placement in placements if placement.rank == rank)


def pipeline_rows(pipeline: Pipeline) -> int:
    """Returns the number of rows of the global batch that a pipeline works through in one step."""
    return pipeline.rows * pipeline.micro_batches


def first_row(plan: Plan, pipeline: int, micro_batch: int) -> int:
    """Returns the row of the global batch at which a micro-batch begins."""
    before = sum(pipeline_rows(p) for p in plan.pipelines[:pipeline])
    return before + micro_batch * plan.pipelines[pipeline].rows


def gradient_bytes(job: Job) -> int:
    """Returns the bytes of one gradient: gradients are kept in the precision of the weights."""
    return 8 if job.precision == "fp64" else 4


def describe_plan(plan: Plan) -> str:
    """Describes a plan in one line: `dp2 tp1 pp2 [12|4r] 8x4 1f1b`.

    The brackets give the number of layers of each stage, with r if it recomputes, and `8x4` is 8
    micro-batches of 4 rows. Unequal rows of replicas read `7+1`, unequal tensor widths `tp4+2`;
    `pp2 vpp3` means three stages on each of two pipeline ranks.
    """
    lines = []
    for pipeline in plan.pipelines:
        meshes = {mesh.inner_widths: mesh for mesh in map(mesh_of, pipeline.stages)}
        mesh = " ".join(widths_text(meshes[widths]) for widths in sorted(meshes))
        cuts = "|".join(
            f"{b - a}{_options_text(s)}" for s in pipeline.stages for a, b in [s.layers]
        )
        rows = {"+".join(map(str, s.rows)): None for s in pipeline.stages if s.rows}
        unequal = [each for each in rows if len(set(each.split("+"))) > 1]
        share = "|".join(unequal) or str(pipeline.rows)
        groups = len(stage_layout(pipeline))
        each = len(pipeline.stages) / max(groups, 1)
        depth = f"pp{groups}" + f" vpp{each:g}" * (each > 1)
        lines.append(f"{mesh} {depth} [{cuts}] {pipeline.micro_batches}x{share}")
    return " + ".join(lines) + f" {plan.schedule}"


def _options_text(stage: Stage) -> str:
    """Formats what techniques add to a stage."""
    return "".join(text(stage) for text in provided("plan", "stage_text"))


StageLayout = tuple[tuple[int, ...], ...]
"""The stages that each pipeline rank holds, in the order of their first stages: ((0, 2),
(1, 3))."""

EXPLICIT_SCHEDULES: tuple[ScheduleName, ...] = ("list", "custom")
"""Schedules that no rule generates: `Pipeline.actions` lists their computations."""


def stage_layout(pipeline: Pipeline) -> StageLayout:
    """Returns the stages that each pipeline rank holds."""
    held: dict[object, list[int]] = {}
    for s, stage in enumerate(pipeline.stages):
        held.setdefault(stage.devices, []).append(s)
    return tuple(tuple(stages) for stages in held.values())


def needed_layout(schedule: ScheduleName, layout: StageLayout) -> str:
    """Returns the layout that a schedule needs, in words; empty if it can run this one."""
    groups = len(layout)
    stages = sum(len(held) for held in layout)
    if schedule in EXPLICIT_SCHEDULES:
        return ""
    if schedule.startswith("interleaved"):
        dealt = tuple(tuple(range(s, stages, groups)) for s in range(groups))
        if stages % groups == 0 and layout == dealt:
            return ""
        return "as many stages on every pipeline rank, dealt out in turn"
    if schedule == "zb-v":
        folded = tuple((s, 2 * groups - 1 - s) for s in range(groups))
        return "" if layout == folded else "two stages on every group: down the line and back up"
    return "" if stages == groups else "each device in one stage"

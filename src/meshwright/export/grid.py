"""Checks whether a plan is the regular grid that other tools know: data x tensor x stages."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import AXES, Mesh, mesh_of, mesh_text, stacked
from meshwright.plan.ranks import describe_plan, stage_layout
from meshwright.plan.spec import Pipeline, Plan, Stage
from meshwright.records import record


@record
class RegularGrid:
    """Describes a plan in which all stages have the same widths and all replicas do the same
    work."""

    data: int
    tensor: int
    layers: tuple[tuple[int, int], ...]
    """Layers [first, last) of each stage; several stages on one mesh each count."""
    rows: int
    """Rows of a micro-batch that one replica takes."""
    micro_batches: int
    meshes: tuple[Mesh[str], ...]
    """The devices of each pipeline rank: the replicas of all pipelines."""

    @property
    def stages(self) -> int:
        """Returns the number of pipeline ranks, each of which holds one stage or several virtual
        stages."""
        return len(self.meshes)

    @property
    def virtual_stages(self) -> int:
        """Returns the number of stages of each pipeline rank."""
        return len(self.layers) // len(self.meshes)


def grid_of(plan: Plan, tool: str) -> RegularGrid:
    """Returns the grid that a plan forms; equal pipelines count as replicas of one.

    Raises PlanError with every reason why the plan is no grid, worded for `tool`.
    """
    problems = [*_problems(plan, tool)]
    PlanError.check(problems)
    stages = plan.pipelines[0].stages
    meshes = tuple(
        stacked(mesh_of(pipeline.stages[s]) for pipeline in plan.pipelines)
        for s, *_ in stage_layout(plan.pipelines[0])
    )
    return RegularGrid(
        data=meshes[0].width("data"),
        tensor=meshes[0].width("tensor"),
        layers=tuple(stage.layers for stage in stages),
        rows=plan.pipelines[0].rows // mesh_of(stages[0]).width("data"),
        micro_batches=plan.pipelines[0].micro_batches,
        meshes=meshes,
    )


def _widths(stage: Stage) -> tuple[int, ...]:
    """Returns the widths of a stage along all axes, those of its first replica."""
    mesh = mesh_of(stage)
    return tuple(mesh.widths(axis)[0] for axis in AXES)


def _work(pipeline: Pipeline) -> tuple[object, ...]:
    """Returns what two pipelines must have in common to be replicas of one."""
    stages = tuple((stage.layers, _widths(stage)) for stage in pipeline.stages)
    return pipeline.micro_batches, pipeline.rows, stages, stage_layout(pipeline)


def _problems(plan: Plan, tool: str) -> Iterator[Problem]:
    if len({_work(pipeline) for pipeline in plan.pipelines}) > 1:
        wanted = f"equal pipelines: {tool} gives every replica the same layers and the same rows"
        yield Problem(plan.name, "pipelines", describe_plan(plan), wanted)
    for p, pipeline in enumerate(plan.pipelines):
        yield from pipeline_problems(plan, p, pipeline, tool)


def pipeline_problems(plan: Plan, index: int, pipeline: Pipeline, tool: str) -> Iterator[Problem]:
    """Yields the reasons why the stages of one pipeline do not form a grid."""
    where = f"pipelines[{index}].stages"
    widths = list(dict.fromkeys(_widths(stage) for stage in pipeline.stages))
    if len(widths) > 1:
        found = ", ".join(" x ".join(map(str, each)) for each in widths)
        wanted = f"one {' x '.join(AXES)} width: {tool} knows only stages of equal width"
        yield Problem(plan.name, where, found, wanted)
    for s, stage in enumerate(pipeline.stages):
        mesh = mesh_of(stage)
        if len(set(mesh.inner_widths)) > 1:
            wanted = f"one tensor width: {tool} gives every replica the same mesh"
            yield Problem(plan.name, f"{where}[{s}].devices", mesh_text(mesh), wanted)
        if stage.rows is not None and len(set(stage.rows)) > 1:
            wanted = f"equal shares: {tool} gives every replica the same number of rows"
            yield Problem(plan.name, f"{where}[{s}].rows", str(list(stage.rows)), wanted)


def blocks_by_stage(plan: Plan, grid: RegularGrid, model: LayerGraph, tool: str) -> tuple[int, ...]:
    """Returns the number of blocks of each stage of a language model, not counting embedding and
    head.

    Raises PlanError if the model does not consist of embedding, blocks and head.
    """
    names = [layer.name for layer in model.layers]
    blocks = [f"blocks.{index}" for index in range(len(names) - 2)]
    if names != ["embedding", *blocks, "head"]:
        wanted = f"a language model of embedding, blocks and head, which {tool} can build"
        raise PlanError(Problem(plan.name, "model", model.name, wanted))
    last = len(names) - 1
    return tuple(min(end, last) - max(first, 1) for first, end in grid.layers)


def is_even(blocks: tuple[int, ...]) -> bool:
    """True if all stages have the same number of blocks."""
    return len(set(blocks)) == 1 and blocks[0] > 0


def schedule_problems(plan: Plan, grid: RegularGrid, tool: str) -> Iterator[Problem]:
    """Yields a Problem if the schedule is not 1F1B and the plan depends on that."""
    if grid.virtual_stages > 1:
        found = f"{grid.virtual_stages} stages on each device, {plan.schedule}"
        wanted = f"one stage on each device: {tool} has no such schedule"
        yield Problem(plan.name, "schedule", found, wanted)
    elif plan.schedule != "1f1b" and grid.stages > 1 and grid.micro_batches > 1:
        wanted = f"1f1b, the only schedule of {tool} for stages that do not interleave"
        mend = 'set "schedule": "1f1b" in the plan: it needs less memory'
        yield Problem(plan.name, "schedule", plan.schedule, wanted, mend)


def precision_problems(plan: Plan, tool: str, *known: str) -> Iterator[Problem]:
    """Yields a Problem if the tool does not compute in the job's precision."""
    if plan.job.precision not in known:
        wanted = f"{' or '.join(known)}, which {tool} computes in"
        yield Problem(plan.name, "job.precision", plan.job.precision, wanted)

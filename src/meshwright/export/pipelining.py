"""A plan's program as the compute-only CSV of torch.distributed.pipelining: a line per stage.

Form: `_PipelineScheduleRuntime._load_csv` of torch 2.13. Every pipeline is a file of its own, with
its stages numbered from 0; all replicas of a pipeline read the same one.
"""

from __future__ import annotations

from meshwright.errors import PlanError
from meshwright.export.grid import pipeline_problems
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Op

TOOL = "torch.distributed.pipelining"


def pipelining_files(plan: Plan, model: LayerGraph) -> dict[str, str]:
    """`schedule.csv`, or `schedule-0.csv` and so on. Raises PlanError for stages of unlike width
    or replicas with unlike rows, between which torch's stages cannot send."""
    PlanError.check(
        problem
        for index, pipeline in enumerate(plan.pipelines)
        for problem in pipeline_problems(plan, index, pipeline, TOOL)
    )
    program = compile_plan(plan, model)
    lines: dict[int, list[str]] = {}
    first: dict[int, int] = {}
    for stage in stage_seats(plan):
        offset = first.setdefault(stage.pipeline, stage.number)
        actions = (
            f"{stage.number - offset}{i.op}{i.micro_batch}"
            for i in program.ranks[stage.seats[0][0].rank]
            if i.op in (Op.FORWARD, Op.BACKWARD)
        )
        lines.setdefault(stage.pipeline, []).append(",".join(actions))
    texts = {index: "\n".join(rows) + "\n" for index, rows in lines.items()}
    if len(set(texts.values())) == 1:
        return {"schedule.csv": texts[0]}
    return {f"schedule-{index}.csv": text for index, text in texts.items()}

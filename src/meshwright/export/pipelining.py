"""Exports a plan's program as the compute-only CSV of torch.distributed.pipelining, and imports it:
one line for each pipeline rank.

Form: `_PipelineScheduleRuntime._load_csv` of torch 2.13: actions such as `0F3`, separated by
commas. Every pipeline is a file of its own, with its stages numbered from 0; all replicas of a
pipeline read the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from meshwright.errors import PlanError, Problem
from meshwright.export.answers import notes_file
from meshwright.export.grid import pipeline_problems
from meshwright.plan.ranks import describe_plan, stage_layout
from meshwright.plan.spec import Pipeline, Plan
from meshwright.program.actions import (
    Order,
    format_action,
    format_order,
    parse_order,
    single_action,
)
from meshwright.program.orders import check_orders, orders_of
from meshwright.techniques import provided

TOOL = "torch.distributed.pipelining"


def pipelining_files(plan: Plan) -> dict[str, str]:
    """Returns the file `schedule.csv`, or `schedule-0.csv` and so on if pipelines differ, and the
    notes. Raises PlanError for stages of different widths or replicas with different rows, between
    which torch's stages cannot send."""
    PlanError.check(
        problem
        for index, pipeline in enumerate(plan.pipelines)
        for problem in pipeline_problems(plan, index, pipeline, TOOL)
    )
    texts = [schedule_csv(orders_of(plan, index)) for index in range(len(plan.pipelines))]
    files = {f"schedule-{index}.csv": text for index, text in enumerate(texts)}
    if len(set(texts)) == 1:
        files = {"schedule.csv": texts[0]}
    return {**files, **notes_file(TOOL, _not_in_csv(plan))}


def _not_in_csv(plan: Plan) -> Iterator[str]:
    """Yields the notes: everything but the schedule."""
    job = plan.job
    cuts = describe_plan(plan)
    yield f"the model, {plan.model.name}, which is your own code, and its cuts: {cuts}"
    yield (
        f"the job: {job.global_batch} rows of {job.sequence} tokens in a step, {job.precision}, "
        f"{job.optimizer}"
    )
    for sentences in provided("export", "beside_the_schedule"):
        yield from sentences(plan)


def schedule_csv(orders: Sequence[Order]) -> str:
    """Formats orders as CSV; a W of several micro-batches becomes single ones, the only kind that
    torch has."""
    rows = (
        ",".join(
            format_action(single_action(action.op, action.stage, m), alone=False)
            for action in order
            for m in range(action.first, action.last)
        )
        for order in orders
    )
    return "\n".join(rows) + "\n"


def with_schedule(plan: Plan, texts: Sequence[str], sources: Sequence[str]) -> Plan:
    """Returns the plan with schedule `custom`, in the order of CSV files, one for every pipeline or
    one for all. Raises PlanError, naming file, line and word, for an order that cannot run."""
    if len(texts) not in (1, len(plan.pipelines)):
        wanted = f"1, or one for each of {len(plan.pipelines)} pipelines"
        raise PlanError(Problem("schedule", "files", str(len(texts)), wanted))
    pairs = list(zip(texts, sources, strict=True))
    pairs = pairs * len(plan.pipelines) if len(pairs) == 1 else pairs
    pipelines = tuple(
        replace(pipeline, actions=_actions(pipeline, text, source))
        for pipeline, (text, source) in zip(plan.pipelines, pairs, strict=True)
    )
    return replace(plan, schedule="custom", pipelines=pipelines, prediction=None)


def _actions(pipeline: Pipeline, text: str, source: str) -> tuple[str, ...]:
    layout = stage_layout(pipeline)
    rows = [row for row in text.splitlines() if row.strip()]
    if len(rows) != len(layout):
        wanted = f"{len(layout)}, one for each pipeline rank"
        raise PlanError(Problem(source, "lines", str(len(rows)), wanted))
    numbered = (tuple(range(len(pipeline.stages))),) * len(layout)
    found = []
    for number, (row, every, held) in enumerate(zip(rows, numbered, layout, strict=True), start=1):
        # Parsed as if the group held every stage, so that each word must name its stage.
        order = parse_order(row.replace(",", " "), every, source=source, field=f"line {number}")
        PlanError.check(
            Problem(
                source,
                f"line {number}, word {index}",
                format_action(action, alone=False),
                f"stages of its devices: {', '.join(map(str, held))}",
            )
            for index, action in enumerate(order)
            if action.stage not in held
        )
        found.append(order)
    check_orders(found, layout, pipeline.micro_batches, source=source, where="file")
    return tuple(
        format_order(order, alone=len(held) == 1) for order, held in zip(found, layout, strict=True)
    )

"""Gives a plan another schedule: one by name, one made for its times, or one imported from CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from meshwright import files
from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import FitError, PlanError, Problem
from meshwright.export.pipelining import with_schedule
from meshwright.plan.ranks import EXPLICIT_SCHEDULES
from meshwright.plan.spec import Plan, ScheduleName
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.search.costs import costs_of
from meshwright.search.list_scheduler.listing import LOOKED_AT
from meshwright.search.options.other_schedules import in_listed_order
from meshwright.search.quick_clock import pipeline_works
from meshwright.workflows.session import Session, priced, with_prediction

MOST_ORDER_BYTES = 16 * files.MEBI
"""Largest CSV in bytes: its actions take thirty times as much memory."""


def with_schedule_named(session: Session, plan: Plan, name: str) -> Plan:
    """Returns the plan with a schedule by name (`list`: one made by the list scheduler for this
    plan), and its prediction.

    Raises PlanError for an unknown name or a schedule that these stages cannot run, and FitError if
    it needs too much memory.
    """
    names = [each for each in get_args(ScheduleName) if each != "custom"]
    if name not in names:
        raise PlanError(Problem("--order", "", repr(name), f"one of: {', '.join(names)}"))
    if name not in EXPLICIT_SCHEDULES:
        pipelines = tuple(replace(pipeline, actions=None) for pipeline in plan.pipelines)
        schedule = cast("ScheduleName", name)
        found = replace(plan, schedule=schedule, pipelines=pipelines, prediction=None)
        return _checked(session, found)
    costs = costs_of(session.model, session.cluster, session.job, session.profile)
    listed = in_listed_order(costs, plan, pipeline_works(plan, costs), LOOKED_AT)
    if listed is None:
        FitError.check(memory_problems(plan, session.model, session.cluster))
        wanted = "room for one micro-batch on every device"
        raise FitError(Problem(plan.name, "pipelines", "none", wanted))
    return _checked(session, listed.plan)


def with_imported_schedule(session: Session, plan: Plan, orders: Sequence[Path]) -> Plan:
    """Returns the plan in the order of torch.distributed.pipelining CSV files, with its prediction.

    Raises PlanError, naming file, line and word, for an order that cannot run.
    """
    texts = [files.read_text(path, error=PlanError, most=MOST_ORDER_BYTES) for path in orders]
    return _checked(session, with_schedule(plan, texts, [str(path) for path in orders]))


def _checked(session: Session, plan: Plan) -> Plan:
    validate_plan(plan, session.model, session.cluster)
    FitError.check(memory_problems(plan, session.model, session.cluster))
    found = priced(session, plan)
    check_program(found.program, source=plan.name)
    return with_prediction(found)

"""Exports a plan to another tool, or the nearest plan that the tool can express."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import FitError, MeshwrightError, PlanError
from meshwright.export.answers import NOTES
from meshwright.export.deepspeed import uniform
from meshwright.export.tools import RUNTIME_OF, check_tool, export_files
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import describe_plan, stage_layout
from meshwright.plan.spec import Plan, with_stages
from meshwright.plan.validate import validate_plan
from meshwright.records import record
from meshwright.search.baselines import BASELINES
from meshwright.techniques import provided
from meshwright.units import format_seconds
from meshwright.workflows.session import (
    Session,
    manual_plan,
    priced,
    simulate_priced,
    with_prediction,
)

Cuts = tuple[tuple[int, int], ...]


@record
class ExportedPlan:
    """Holds a plan, and the files that another tool needs to train by it."""

    plan: Plan
    files: dict[str, str]
    """Text of each file by name."""

    @property
    def not_expressed(self) -> tuple[str, ...]:
        """Returns sentences on what the tool's files do not express, read from their notes."""
        lines = self.files.get(NOTES, "").splitlines()
        return tuple(line.removeprefix("- ") for line in lines if line.startswith("- "))


def export_plan(session: Session, plan: Plan, tool: str, *, nearest: bool = False) -> ExportedPlan:
    """Exports a plan to another tool; with `nearest`, the nearest plan that it can express if it
    cannot express this one.

    Raises PlanError with the reasons why it cannot, and which plan it could express.
    """
    check_tool(tool)
    try:
        return ExportedPlan(plan=plan, files=export_files(plan, session.model, tool))
    except PlanError as refusal:
        near = _nearest(session, plan, tool)
        if nearest and near:
            return near
        first, *others = refusal.problems
        first = replace(first, mend=_mend(first.mend, plan, near))
        raise PlanError(first, *others) from None


def seconds_there(session: Session, plan: Plan, tool: str) -> float:
    """Returns the predicted seconds of a step of a plan that a tool runs."""
    there = replace(plan, job=replace(plan.job, runtime=RUNTIME_OF[tool]))
    return simulate_priced(priced(session, there)).step_seconds


def _nearest(session: Session, plan: Plan, tool: str) -> ExportedPlan | None:
    """Returns the fastest exportable plan among the plan's regular forms and the baselines."""
    found: list[ExportedPlan] = []
    for candidate in _candidates(session, plan):
        try:
            files = export_files(candidate, session.model, tool)
        except PlanError:  # the tool cannot express this one either
            continue
        found.append(ExportedPlan(plan=candidate, files=files))
    return min(found, key=lambda each: _seconds(each.plan), default=None)


def _seconds(plan: Plan) -> float:
    return plan.prediction.step_seconds if plan.prediction else math.inf


def _candidates(session: Session, plan: Plan) -> Iterator[Plan]:
    """Yields alternatives that are valid and fit into memory, each with its prediction."""
    for variant in regular_forms(plan, session.model):
        try:
            validate_plan(variant, session.model, session.cluster)
            FitError.check(memory_problems(variant, session.model, session.cluster))
        except MeshwrightError:  # it would not run
            continue
        yield with_prediction(priced(session, variant))
    for name in BASELINES:
        try:
            yield manual_plan(session, name)
        except MeshwrightError:  # there is none for this cluster
            continue


def regular_forms(plan: Plan, model: LayerGraph) -> Iterator[Plan]:
    """Yields the plan on the same devices in regular forms: one stage on each device, even cuts,
    and schedule 1F1B; first with all that techniques add to its stages, then without each part of
    it, and each combination of parts."""
    layouts = [stage_layout(pipeline) for pipeline in plan.pipelines]
    groups = len(layouts[0])
    if any(len(layout) != groups for layout in layouts):
        return
    own = tuple(stage.layers for stage in plan.pipelines[0].stages)
    known = (own,) if len(own) == groups else ()
    for cuts in dict.fromkeys((*known, *even_stage_cuts(len(model.layers), groups))):
        pipelines = tuple(
            replace(
                pipeline,
                actions=None,
                stages=tuple(
                    replace(pipeline.stages[held[0]], layers=layers)
                    for held, layers in zip(layout, cuts, strict=True)
                ),
            )
            for pipeline, layout in zip(plan.pipelines, layouts, strict=True)
        )
        form = replace(plan, schedule="1f1b", pipelines=pipelines, prediction=None)
        forms = [form]
        for without in provided("plan", "without"):
            forms += [with_stages(each, without) for each in forms]
        yield from dict.fromkeys(forms)


def even_stage_cuts(layers: int, stages: int) -> Iterator[Cuts]:
    """Yields cuts with equally many layers on each stage, and with equally many blocks on all
    stages but the last."""
    if layers >= stages:
        yield uniform(layers, stages)
    blocks = layers - 2
    for each in (blocks // stages, -(-blocks // stages)):
        if each > 0 and blocks - each * (stages - 1) > 0:
            starts = [0, *(1 + each * stage for stage in range(1, stages)), layers]
            yield tuple(pairwise(starts))


def _mend(mend: str, plan: Plan, near: ExportedPlan | None) -> str:
    """Adds the nearest plan to the mend of a refusal."""
    if near is None:
        return mend or "no other plan for this job can be written for it either"
    own = f", not {format_seconds(_seconds(plan))}" if plan.prediction else ""
    text = (
        f"the nearest that it takes, {describe_plan(near.plan)}, needs "
        f"{format_seconds(_seconds(near.plan))} a step{own}: --nearest writes that"
    )
    return f"{mend}; or: {text}" if mend else text

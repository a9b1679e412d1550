"""Finds virtual stages (stages on the same devices), and checks that a schedule can run their
layout."""

from __future__ import annotations

from meshwright.plan.spec import Pipeline, ScheduleName

Layout = tuple[tuple[int, ...], ...]
"""The stages that each group of devices holds; groups in the order of their first stages: ((0, 2),
(1, 3))."""

IN_PLAN: tuple[ScheduleName, ...] = ("list", "custom")
"""Schedules that no rule generates: `Pipeline.actions` lists their computations."""


def layout_of(pipeline: Pipeline) -> Layout:
    """Return the stages that each group of devices holds."""
    held: dict[object, list[int]] = {}
    for s, stage in enumerate(pipeline.stages):
        held.setdefault(stage.devices, []).append(s)
    return tuple(tuple(stages) for stages in held.values())


def layout_wanted(schedule: ScheduleName, layout: Layout) -> str:
    """Return the layout that a schedule needs, in words; empty if it can run this one."""
    groups = len(layout)
    stages = sum(len(held) for held in layout)
    if schedule in IN_PLAN:
        return ""
    if schedule.startswith("interleaved"):
        dealt = tuple(tuple(range(s, stages, groups)) for s in range(groups))
        if stages % groups == 0 and layout == dealt:
            return ""
        return "as many stages on every group of devices, dealt out in turn"
    if schedule == "zb-v":
        folded = tuple((s, 2 * groups - 1 - s) for s in range(groups))
        return "" if layout == folded else "two stages on every group: down the line and back up"
    return "" if stages == groups else "each device in one stage"

"""Which stages of a pipeline stand on the same devices, and which schedules can play that."""

from __future__ import annotations

from meshwright.plan.spec import Pipeline, ScheduleName

Layout = tuple[tuple[int, ...], ...]
"""Of every group of devices, in the order of their first stages: the stages that it holds."""

IN_PLAN: tuple[ScheduleName, ...] = ("list", "custom")
"""Schedules without a rule: `Pipeline.actions` says what is done."""


def layout_of(pipeline: Pipeline) -> Layout:
    """The stages of every group of devices."""
    held: dict[object, list[int]] = {}
    for s, stage in enumerate(pipeline.stages):
        held.setdefault(stage.devices, []).append(s)
    return tuple(tuple(stages) for stages in held.values())


def layout_wanted(schedule: ScheduleName, layout: Layout) -> str:
    """What a schedule asks of the places of stages; empty: it can play this layout."""
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

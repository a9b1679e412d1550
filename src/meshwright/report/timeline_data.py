"""Converts timelines to the plain data that the page's script draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Interval, Timeline
from meshwright.report.palette import KIND_NAMES, KINDS

_KINDS = tuple(KINDS)


def timeline_data(timelines: Sequence[Timeline], cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """Returns ranks (with device, type and stages), kinds (with colours), and every interval of
    every timeline.

    An interval is [kind, start, end, label, peer, bytes], times in microseconds to the nanosecond;
    the last two are left out if there are none.
    """
    types = {device.name: device.type for device in devices_of(cluster)}
    stages: dict[int, list[int]] = {}
    for placement in (each for stage in stage_placements(plan) for each in stage.mesh.members):
        stages.setdefault(placement.rank, []).append(placement.stage)
    names = {"simulated": "predicted", "measured": "measured"}
    return {
        "ranks": [
            {"device": device, "type": types[device], "stage": _number(stages[rank])}
            for rank, device in enumerate(plan.devices)
        ],
        "kinds": [{"name": KIND_NAMES[kind], "colour": KINDS[kind]} for kind in _KINDS],
        "timelines": [
            {
                "name": names[timeline.source],
                "end": _microseconds(timeline.step_seconds),
                "ranks": _by_rank(timeline),
            }
            for timeline in timelines
        ],
    }


def _number(stages: list[int]) -> int | str:
    return ", ".join(map(str, stages)) if len(stages) > 1 else stages[0]


def _by_rank(timeline: Timeline) -> list[list[list[Any]]]:
    rows: list[list[list[Any]]] = [[] for _ in timeline.devices]
    for interval in timeline.intervals:
        rows[interval.rank].append(_row(interval))
    return rows


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _row(i: Interval) -> list[Any]:
    kind = str(i.op) if i.stream == "compute" else i.stream
    row = [_KINDS.index(kind), _microseconds(i.start_seconds), _microseconds(i.end_seconds)]
    return [*row, i.label, *([i.peer, i.bytes] if i.peer is not None or i.bytes else [])]

"""Every plan of the planner's space, written down one after another and simulated.

Nothing is bounded, and nothing is shared with the search but the plan format and the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import get_args

from meshwright.cluster.spec import devices_of, node_of
from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import PlanError
from meshwright.plan.ranks import EXPLICIT_SCHEDULES, stage_layout
from meshwright.plan.spec import Pipeline, ScheduleName, Stage
from meshwright.plan.validate import validate_plan
from meshwright.program.orders import orders_of
from meshwright.simulate.simulator import simulate_plan
from worlds import plan_by_hand

SAME_UNIT, NEW_REPLICA, NEW_STAGE, NEW_PIPELINE = range(4)

ONCE = ("once",)
"""Every device in one stage."""
LAYOUTS = ("once", "in turn", "there and back")
"""Ways in which the devices of a pipeline hold one stage or two each."""
NAMED = tuple(name for name in get_args(ScheduleName) if name not in EXPLICIT_SCHEDULES)
"""Every schedule with a rule."""


def every_plan(model, cluster, job, schedules=("1f1b", "gpipe"), layouts=ONCE):
    """All legal plans that fit and whose tensor-parallel groups stay inside a node."""
    order = [device.name for device in devices_of(cluster)]
    for shape, layout in product(_shapes(cluster), layouts):
        for pipelines in _filled(shape, job.global_batch, len(model.layers), layout):
            used = {d for p in pipelines for s in p.stages for unit in s.devices for d in unit}
            for schedule in schedules:
                plan = plan_by_hand(
                    *pipelines,
                    job=job,
                    schedule=schedule,
                    devices=tuple(name for name in order if name in used),
                )
                if _legal(plan, model, cluster):
                    yield from _fitting(plan, model, cluster)


def least_seconds(model, cluster, job, schedules=("1f1b", "gpipe"), layouts=ONCE):
    """Of every plan the least simulated seconds; None if none fits; and how many there are."""
    seconds = [
        simulate_plan(p, model, cluster).step_seconds
        for p in every_plan(model, cluster, job, schedules, layouts)
    ]
    return min(seconds, default=None), len(seconds)


def every_order(plan, model, cluster):
    """The plan of one pipeline with every order of its computations that can run and fits.
    Micro-batches are alike and come in order; all backwards of a device are whole, or all are in
    two parts."""
    pipeline = plan.pipelines[0]
    sequences = list(_sequences(pipeline.micro_batches, "FB"))
    sequences += _sequences(pipeline.micro_batches, "FIW")
    for chosen in product(sequences, repeat=len(stage_layout(pipeline))):
        ordered = replace(
            plan, schedule="custom", pipelines=(replace(pipeline, actions=tuple(chosen)),)
        )
        possible = _ends(ordered) and _legal(ordered, model, cluster)
        if possible and not memory_problems(ordered, model, cluster):
            yield ordered


def _sequences(count: int, parts: str) -> Iterator[str]:
    """Every order of `count` micro-batches' parts in which each waits for the one before."""

    def further(done: tuple[int, ...], words: list[str]) -> Iterator[str]:
        if min(done) == count:
            yield " ".join(words)
        for at, number in enumerate(done):
            if number < (done[at - 1] if at else count):
                more = (*done[:at], number + 1, *done[at + 1 :])
                yield from further(more, [*words, f"{parts[at]}{number}"])

    return further((0,) * len(parts), [])


def _ends(plan):
    """Whether the devices do not wait for each other for ever."""
    try:
        orders_of(plan, 0)
    except PlanError:
        return False
    return True


def _legal(plan, model, cluster):
    """Also by the search's rules: replicas of a stage have one tensor width, and of those of all
    holders of a layer each divides the widest."""
    try:
        validate_plan(plan, model, cluster)
    except PlanError:
        return False
    width = {}
    for stage in (stage for pipeline in plan.pipelines for stage in pipeline.stages):
        for layer in range(*stage.layers):
            width.setdefault(layer, set()).update(len(unit) for unit in stage.devices)
        if len({len(unit) for unit in stage.devices}) > 1:
            return False
    tied = (set().union(*(width[layer] for layer in each.layers)) for each in model.tied)
    every = (*width.values(), *tied)
    return all(max(widths) % each == 0 for widths in every for each in widths)


def _fitting(plan, model, cluster):
    """The plan if it fits; else every way to recompute in some of its stages that does. Where a
    stage fits, recomputation would only make it slower."""
    if not memory_problems(plan, model, cluster):
        yield plan
        return
    count = sum(len(pipeline.stages) for pipeline in plan.pipelines)
    if memory_problems(_recomputing(plan, (True,) * count), model, cluster):
        return
    for choice in product((False, True), repeat=count):
        variant = _recomputing(plan, choice)
        if not memory_problems(variant, model, cluster):
            yield variant


def _recomputing(plan, choice):
    """The plan with recomputation in the stages that are chosen, over all pipelines."""
    flags = iter(choice)
    pipelines = tuple(
        replace(p, stages=tuple(replace(s, recompute=next(flags)) for s in p.stages))
        for p in plan.pipelines
    )
    return replace(plan, pipelines=pipelines)


def _shapes(cluster):
    """Devices in every order, cut into units, replicas, stages and pipelines in every way. Devices
    of one type in one node, or in one island of it, are used in order, or nothing would be left of
    the day."""
    rank = {device.name: i for i, device in enumerate(devices_of(cluster))}
    classes = {d.name: (d.node, d.type, d.island) for d in devices_of(cluster)}
    seen = set()
    for number in range(1, len(classes) + 1):
        for order in permutations(classes, number):
            taken = {}
            for name in order:
                taken.setdefault(classes[name], []).append(rank[name])
            first = {key: [rank[n] for n in classes if classes[n] == key] for key in taken}
            if any(used != first[key][: len(used)] for key, used in taken.items()):
                continue
            for breaks in product(range(4), repeat=number - 1):
                shape = _cut(order, breaks)
                units = [unit for line in shape for stage in line for unit in stage]
                inside = all(len({node_of(d) for d in unit}) == 1 for unit in units)
                ascending = all(list(u) == sorted(u, key=rank.get) for u in units)
                key = frozenset(shape)
                if inside and ascending and key not in seen:
                    seen.add(key)
                    yield shape


def _cut(order, breaks):
    lines = [[[[order[0]]]]]
    for name, mark in zip(order[1:], breaks, strict=True):
        if mark == NEW_PIPELINE:
            lines.append([[[name]]])
        elif mark == NEW_STAGE:
            lines[-1].append([[name]])
        elif mark == NEW_REPLICA:
            lines[-1][-1].append([name])
        else:
            lines[-1][-1][-1].append(name)
    return tuple(tuple(tuple(tuple(unit) for unit in stage) for stage in line) for line in lines)


def _sums(total, parts):
    for cuts in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, total), strict=True))


def _filled(shape, batch, layers, layout):
    for shares in _sums(batch, len(shape)):
        yield from product(
            *(
                list(_pipelines(line, share, layers, layout))
                for line, share in zip(shape, shares, strict=True)
            )
        )


def _pipelines(line, share, layers, layout):
    again = {"once": (), "in turn": line, "there and back": line[::-1]}[layout]
    for rows in (r for r in range(1, share + 1) if share % r == 0):
        for sizes in _sums(layers, len(line) + len(again)):
            for once in product(*(list(_sums(rows, len(stage))) for stage in line)):
                split = once + (once[::-1] if layout == "there and back" else once[: len(again)])
                ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
                yield Pipeline(
                    micro_batches=share // rows,
                    rows=rows,
                    stages=tuple(
                        Stage(layers=(end - size, end), devices=stage, rows=row)
                        for end, size, stage, row in zip(
                            ends, sizes, line + again, split, strict=True
                        )
                    ),
                )

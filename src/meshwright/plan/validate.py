"""Checks every invariant of a plan, each with its own message; all violations are reported
together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from meshwright.cluster.spec import Cluster, cluster_fingerprint, devices_of, node_of
from meshwright.errors import PlanError, Problem
from meshwright.model.spec import LayerGraph, structure_fingerprint
from meshwright.plan.mesh import mesh_of
from meshwright.plan.ranks import EXPLICIT_SCHEDULES, needed_layout, pipeline_rows, stage_layout
from meshwright.plan.spec import Pipeline, Plan, ScheduleName, Stage
from meshwright.techniques import provided

MOST_PASSES = 2_000_000
"""Largest number of passes of a micro-batch through a stage on a device in one step."""


def validate_plan(
    plan: Plan,
    model: LayerGraph | None = None,
    cluster: Cluster | None = None,
    *,
    source: str = "plan",
) -> None:
    """Checks a plan by itself, and against the model and cluster if they are given.

    Memory is checked by cost.memory. Raises PlanError with one Problem per mistake.
    """
    PlanError.check(_problems(plan, model, cluster, source))


def _problems(
    plan: Plan, model: LayerGraph | None, cluster: Cluster | None, source: str
) -> Iterator[Problem]:
    yield from _batch(plan, source)
    yield from _length(plan, source)
    yield from _devices(plan, source)
    yield from _of_each_pipeline(_pipelines(plan, source))
    if model is not None:
        yield from _against_model(plan, model, source)
    if cluster is not None:
        yield from _against_cluster(plan, cluster, source)
    for problems in provided("plan", "problems"):
        yield from problems(plan, model, source)


def _pipelines(plan: Plan, source: str) -> Iterator[Problem]:
    for p, pipeline in enumerate(plan.pipelines):
        where = f"pipelines[{p}]"
        for name, value in (("micro_batches", pipeline.micro_batches), ("rows", pipeline.rows)):
            if value < 1:
                yield Problem(source, f"{where}.{name}", str(value), "at least 1")
        yield from _stages(pipeline, where, source)
        yield from _schedule(plan.schedule, pipeline, where, source)
        for s, stage in enumerate(pipeline.stages):
            yield from _mesh(stage, pipeline.rows, f"{where}.stages[{s}]", source)


def _of_each_pipeline(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Marks problems that several pipelines may have in common, each in its own stages."""
    return (replace(problem, each=("pipeline", "")) for problem in problems)


def _batch(plan: Plan, source: str) -> Iterator[Problem]:
    job = plan.job
    for name, value in (("global_batch", job.global_batch), ("sequence", job.sequence)):
        if value < 1:
            yield Problem(source, f"job.{name}", str(value), "at least 1")
    if not plan.pipelines:
        yield Problem(source, "pipelines", "none", "at least one pipeline")
        return
    rows = sum(pipeline_rows(pipeline) for pipeline in plan.pipelines)
    if rows != job.global_batch:
        shares = " + ".join(f"{p.micro_batches} x {p.rows}" for p in plan.pipelines)
        yield Problem(
            source,
            "pipelines",
            f"{shares} = {rows} rows",
            f"job.global_batch = {job.global_batch} rows",
            "change micro_batches or rows of a pipeline, or the job's global_batch",
        )


def _length(plan: Plan, source: str) -> Iterator[Problem]:
    """Yields a Problem if the program, which lists every pass on every device, would be too long to
    hold in memory while it is checked."""
    passes = sum(
        pipeline.micro_batches * sum(len(mesh_of(stage).members) for stage in pipeline.stages)
        for pipeline in plan.pipelines
    )
    if passes > MOST_PASSES:
        found = f"{passes:,} micro-batches on all stages and devices together"
        mend = "give the micro-batches more rows"
        yield Problem(source, "pipelines", found, f"at most {MOST_PASSES:,}", mend)


def _devices(plan: Plan, source: str) -> Iterator[Problem]:
    listed = Counter(plan.devices)
    for device, count in sorted(listed.items()):
        if count > 1:
            found = f"{device} {count} times"
            yield Problem(source, "devices", found, "each device once", each=("device", device))
        if not node_of(device):
            yield Problem(source, "devices", repr(device), "'node:index', for example 'a:0'")
    nodes = [node_of(device) for device in plan.devices]
    runs = [node for i, node in enumerate(nodes) if i == 0 or nodes[i - 1] != node]
    for node, count in sorted(Counter(runs).items()):
        if count > 1:
            wanted = "all devices of a node next to each other: ranks are started node by node"
            found = f"{node} in {count} places"
            yield Problem(source, "devices", found, wanted, each=("node", node))
    used: Counter[str] = Counter()
    for where, device in _places(plan):
        used[device] += 1
        each = ("device", device)
        if device not in listed:
            wanted = "a device that the plan's `devices` lists"
            yield Problem(source, where, device, wanted, each=each)
        if used[device] == 2:
            yield Problem(source, where, f"{device} again", "each device in one place", each=each)
    for device in sorted(set(listed) - set(used)):
        found, wanted = f"{device}, which no stage uses", "only used ones"
        mend = "put it into a stage, or take it out of `devices`"
        yield Problem(source, "devices", found, wanted, mend, each=("device", device))


def _places(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yields the field that names a device, and the device, for every device of every mesh. A mesh
    that holds several stages of a pipeline counts once; `_schedule` checks these."""
    for p, pipeline in enumerate(plan.pipelines):
        for held in stage_layout(pipeline):
            where = f"pipelines[{p}].stages[{held[0]}].devices"
            yield from ((where, device) for device in mesh_of(pipeline.stages[held[0]]).members)


def _stages(pipeline: Pipeline, where: str, source: str) -> Iterator[Problem]:
    if not pipeline.stages:
        yield Problem(source, f"{where}.stages", "none", "at least one stage")
    expected = 0
    for s, stage in enumerate(pipeline.stages):
        first, last = stage.layers
        field = f"{where}.stages[{s}].layers"
        if last <= first:
            yield Problem(source, field, f"[{first}, {last}]", "at least one layer")
        if first != expected:
            lost = "a gap" if first > expected else "an overlap"
            yield Problem(
                source,
                field,
                f"[{first}, {last}], {lost} after layer {expected}",
                f"[{expected}, ...]: every layer exactly once, in order",
            )
        expected = last
        if s == 0 and stage.boundary is not None:
            found = f"{stage.boundary!r} on the first stage"
            wanted = "absent: nothing comes from a stage before it"
            yield Problem(source, f"{where}.stages[0].boundary", found, wanted)


def _schedule(
    schedule: ScheduleName, pipeline: Pipeline, where: str, source: str
) -> Iterator[Problem]:
    """Yields a Problem for stages that share devices although the schedule cannot run that, and for
    too many or too few actions."""
    layout = stage_layout(pipeline)
    wanted = needed_layout(schedule, layout)
    for held in layout:
        first, *others = (pipeline.stages[s] for s in held)
        for s, stage in zip(held[1:], others, strict=True):
            at = f"{where}.stages[{s}]"
            if wanted:
                found = f"{stage.devices[0][0]} again" if stage.devices[0] else "the same devices"
                mend = "interleaved-1f1b, zb-v, list and custom play several stages on one device"
                yield Problem(source, f"{at}.devices", found, f"{wanted} ({schedule})", mend)
            if stage.rows != first.rows:
                found, need = f"{stage.rows}", f"{first.rows}, as stage {held[0]} on these devices"
                yield Problem(source, f"{at}.rows", found, need)
    if wanted and len(layout) == len(pipeline.stages) and pipeline.stages:
        found = f"each of {len(layout)} stages on devices of its own"
        yield Problem(source, f"{where}.stages", found, f"{wanted} ({schedule})")
    texts = 0 if pipeline.actions is None else len(pipeline.actions)
    if schedule in EXPLICIT_SCHEDULES and texts != len(layout):
        need = f"{len(layout)} texts, one for each pipeline rank (schedule {schedule})"
        yield Problem(source, f"{where}.actions", str(texts), need)
    if schedule not in EXPLICIT_SCHEDULES and pipeline.actions is not None:
        need = f"none: {schedule} says what is done; or the schedule `custom`"
        yield Problem(source, f"{where}.actions", f"{texts} texts", need)


def _mesh(stage: Stage, rows: int, where: str, source: str) -> Iterator[Problem]:
    if not all(stage.devices) or not stage.devices:
        yield Problem(source, f"{where}.devices", "an empty mesh", "at least one device")
        return
    data = mesh_of(stage).width("data")
    if stage.rows is None:
        if rows % data:
            yield Problem(
                source,
                f"{where}.devices",
                f"{data} replicas for micro-batches of {rows} rows",
                "a number of replicas that divides them",
                "change the pipeline's rows, or give the stage's `rows` per replica",
            )
    elif len(stage.rows) != data or sum(stage.rows) != rows or min(stage.rows) < 1:
        wanted = f"{data} positive numbers that add up to {rows}"
        yield Problem(source, f"{where}.rows", str(list(stage.rows)), wanted)


def _against_model(plan: Plan, model: LayerGraph, source: str) -> Iterator[Problem]:
    wanted = plan.model.fingerprint
    if wanted and wanted != structure_fingerprint(model):
        yield Problem(
            source,
            "model.fingerprint",
            f"{wanted} ({plan.model.name})",
            f"{structure_fingerprint(model)}, the model given "
            f"({model.name}, {len(model.layers)} layers)",
            "plan again for this model; or empty the field to use the plan all the same",
        )
    for name, found, need in (
        ("sequence", plan.job.sequence, model.sequence),
        ("precision", plan.job.precision, model.precision),
    ):
        if found != need:
            yield Problem(source, f"job.{name}", str(found), f"{need}, as the model was built")
    for p, pipeline in enumerate(plan.pipelines):
        end = pipeline.stages[-1].layers[1] if pipeline.stages else 0
        if end != len(model.layers):
            yield Problem(
                source,
                f"pipelines[{p}].stages",
                f"layers up to {end}",
                f"all {len(model.layers)} layers of {model.name}",
                each=("pipeline", ""),
            )
    yield from _of_each_pipeline(_tensor_widths(plan, model, source))


def _tensor_widths(plan: Plan, model: LayerGraph, source: str) -> Iterator[Problem]:
    """Yields a Problem for each tensor width that does not divide a layer; replicas may differ in
    width."""
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            held = range(max(0, stage.layers[0]), min(stage.layers[1], len(model.layers)))
            for width in sorted({*mesh_of(stage).widths("tensor")} - {0}):
                for layer in (model.layers[n] for n in held):
                    units = layer.along("tensor").units
                    if units % width:
                        yield Problem(
                            source,
                            f"pipelines[{p}].stages[{s}].devices",
                            f"tensor width {width} for layer {layer.name}",
                            f"a width that divides {units} (its heads and hidden units)",
                        )
                        break


def _against_cluster(plan: Plan, cluster: Cluster, source: str) -> Iterator[Problem]:
    wanted = plan.cluster.fingerprint
    if wanted and wanted != cluster_fingerprint(cluster):
        yield Problem(
            source,
            "cluster.fingerprint",
            f"{wanted} ({plan.cluster.name})",
            f"{cluster_fingerprint(cluster)}, the cluster given ({cluster.name})",
            "plan again for this cluster; or empty the field to use the plan all the same",
        )
    known = {device.name: device for device in devices_of(cluster)}
    for device in plan.devices:
        if device not in known:
            wanted = f"a device of {cluster.name}"
            yield Problem(source, "devices", device, wanted, each=("device", device))
        elif plan.job.precision not in cluster.types[known[device].type].peak:
            offers = ", ".join(cluster.types[known[device].type].peak)
            yield Problem(
                source,
                "job.precision",
                f"{plan.job.precision} on {device} ({known[device].type})",
                f"one that it has: {offers}",
                each=("device", device),
            )

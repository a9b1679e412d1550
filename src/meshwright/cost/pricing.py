"""Prices every instruction of a program: seconds of compute, traffic on the links."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import Resource
from meshwright.cost.constants import system_constants
from meshwright.cost.links import (
    messages_are_serialised,
    overhead_seconds,
)
from meshwright.cost.memory import adjustments, device_stage_memory, framework_bytes, memory_tables
from meshwright.cost.operation_prices import pricings
from meshwright.cost.pricing_context import (
    Price,
    PricedStage,
    PricingContext,
    RankContext,
    one_micro_batch_memory,
)
from meshwright.cost.profile import Profile
from meshwright.cost.runtimes import as_run_by
from meshwright.cost.times import LayerTimeCache, ReplicaSeconds, layer_time_cache
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import (
    RankPlacement,
    RankView,
    StagePlacement,
    stage_placements,
)
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction, Program, completing_layer, micro_batches_of
from meshwright.records import record
from meshwright.stopping import raise_if_stopped


@record
class Prices:
    """Holds everything but the program itself that the simulator needs."""

    ranks: tuple[tuple[Price, ...], ...]
    """The price of every instruction, in the order of Program.ranks."""
    bandwidth: Mapping[Resource, float]
    """The bytes per second of every resource that traffic uses."""
    devices: tuple[str, ...]
    """The device of every rank."""
    static_bytes: tuple[int, ...]
    """The bytes of parameters, gradients, optimizer states and buffers on every rank."""
    overhead_seconds: float = 0.0
    """The fixed cost of a step outside all instructions."""


def price_program(
    program: Program,
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    times: LayerTimeCache | None = None,
) -> Prices:
    """Prices every instruction of a plan's program; some ranks of it may have no instructions.

    `times` are the layer times of the model, the cluster and the profile, if the caller has them.
    Raises ClusterError if a device does not offer the model's precision.
    """
    profile = as_run_by(plan.job.runtime, profile, model, compiled=plan.job.compiled)
    times = times or layer_time_cache(model, cluster, profile)
    context = _context(plan, model, cluster, profile, times)
    held = _placed_stages(program, context, times)
    return Prices(
        ranks=tuple(
            _prices(RankContext(own, held[rank], context)) if own else ()
            for rank, own in enumerate(program.ranks)
        ),
        bandwidth=context.links.capacities,
        devices=plan.devices,
        static_bytes=tuple(
            _static_bytes([(s.stage, s.placement) for s in held[rank].values()], context)
            if own
            else 0
            for rank, own in enumerate(program.ranks)
        ),
        overhead_seconds=overhead_seconds(profile),
    )


def _context(
    plan: Plan, model: LayerGraph, cluster: Cluster, profile: Profile | None, times: LayerTimeCache
) -> PricingContext:
    return PricingContext(
        model=model,
        plan=plan,
        cluster=cluster,
        profile=profile,
        links=times.links,
        step_latency=times.step_latency,
        queued=messages_are_serialised(cluster),
        system=system_constants(profile.calibration if profile else None),
        tables=memory_tables(model, plan.job),
        adjustments=adjustments(plan, model),
    )


def _placed_stages(
    program: Program, context: PricingContext, times: LayerTimeCache
) -> dict[int, dict[int, PricedStage]]:
    """Returns the stages of every rank that has instructions, by number."""
    plan, links = context.plan, context.links
    held: dict[int, dict[int, PricedStage]] = defaultdict(dict)
    for stage in stage_placements(plan):
        raise_if_stopped()
        members = stage.mesh.members
        working = {number for number, own in enumerate(members) if program.ranks[own.rank]}
        for group in stage.mesh.groups("tensor", working):
            computes = ReplicaSeconds(
                times,
                stage.layers,
                [links.devices[placement.device].type for placement in group],
                [placement.device for placement in group],
                group[0].rows[1] - group[0].rows[0],
                stage.plan_stage,
            )
            for placement in group:
                if program.ranks[placement.rank]:
                    held[placement.rank][stage.number] = PricedStage(stage, placement, computes)
    return held


def _prices(rank: RankContext) -> tuple[Price, ...]:
    """Prices the instructions of one rank."""
    raise_if_stopped()
    functions = pricings()
    known: dict[tuple[object, ...], Price] = {}
    found: list[Price] = []
    for i in rank.instructions:
        if i.op.part not in ("compute", "transfers"):
            found.append(functions[i.op](i, rank))
            continue
        # These are alike for every micro-batch.
        batched = i.micro_batches and len(micro_batches_of(i))
        key = (i.stage, i.op, batched, i.peer, i.bytes, i.ranks)
        priced = known.get(key)
        if priced is None:
            priced = known[key] = functions[i.op](i, rank)
        found.append(priced)
    completes: dict[int, list[tuple[int, float]]] = {}
    for reduction, backward in _backward_of_reductions(rank.instructions).items():
        offset = _completion_seconds(rank, rank.instructions[reduction], backward)
        completes.setdefault(backward, []).append((reduction, offset))
        found[reduction] = replace(found[reduction], completed_by=backward)
    for backward, reductions in completes.items():
        found[backward] = replace(found[backward], completes=tuple(reductions))
    return tuple(found)


def _completion_seconds(rank: RankContext, reduction: Instruction, backward: int) -> float:
    """Returns the seconds from the start of a backward to the moment at which the gradients of a
    reduction are complete."""
    i = rank.instructions[backward]
    seated, context = rank.stage_of(i), rank.pricing
    layers = seated.stage.layers
    seconds = seated.times.of(i.op, len(micro_batches_of(i)))
    layer = completing_layer(reduction, layers, context.model)
    offset = float(seconds[layer - layers[0] :].sum())
    return offset + context.system.reduction_delay * (float(seconds.sum()) - offset)


def _backward_of_reductions(instructions: Sequence[Instruction]) -> dict[int, int]:
    """Maps the index of each reduction to that of its stage's last backward (B or W).

    A reduction posted after that backward is left out: its gradients are complete already.
    """
    last: dict[int, int] = {}
    sums: list[tuple[int, int]] = []
    for index, i in enumerate(instructions):
        if i.op.completes_gradients:
            last[i.stage] = index
        elif i.op.of_gradients:
            sums.append((index, i.stage))
    return {index: last[stage] for index, stage in sums if last.get(stage, -1) > index}


def _static_bytes(
    own: Sequence[tuple[StagePlacement, RankPlacement]], context: PricingContext
) -> int:
    """Returns the bytes that a rank holds whichever micro-batches are in flight."""
    stages = tuple(stage for stage, _ in own)
    parts = device_stage_memory(
        context.tables.plain,
        stages,
        own[0][1].width("tensor"),
        [one_micro_batch_memory(stage, placement, context) for stage, placement in own],
    )
    for adjust in context.adjustments:
        parts = adjust(parts, RankView(stages=stages, placement=own[0][1]))
    device = context.type_of(own[0][1].device)
    states = parts.parameters + parts.gradients + parts.optimizer
    return framework_bytes(device) + round(float(states + parts.buffers))

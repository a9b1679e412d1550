"""What every instruction of a program costs: seconds of compute, traffic on the links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.collective import (
    Traffic,
    all_gather,
    all_reduce,
    alone_seconds,
    boundary_transfer,
    broadcast,
)
from meshwright.cost.compute import LayerSeconds, layer_seconds, optimizer_seconds
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.links import overhead_seconds, reached_links, ring_step
from meshwright.cost.memory import (
    MemoryTables,
    StageMemory,
    framework_bytes,
    memory_tables,
    stage_memory,
    stage_parameters,
    table_of,
)
from meshwright.cost.profile import Profile
from meshwright.model.recompute import recomputed
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.buckets import completing_layer
from meshwright.program.instructions import (
    COMPUTE,
    GATHERED,
    RECEIVES,
    SENDS,
    Instruction,
    Op,
    Program,
)
from meshwright.records import record

Array = NDArray[np.float64]

NOTHING = Traffic(bytes_by_resource={})


@record
class Price:
    """Cost of one instruction on its rank."""

    seconds: float = 0.0
    """Of compute, the tensor-parallel all-reduces of the layers included."""
    traffic: Traffic = NOTHING
    """Of a send (its receive moves with it) or a collective."""
    inside: int | None = None
    """Of a REDUCE_GRAD: index of the backward that completes its gradients."""
    completes: tuple[tuple[int, float], ...] = ()
    """Of that backward: indices of its REDUCE_GRADs, and seconds after its start at which the
    gradients of each are complete."""


@record
class Prices:
    """Everything the simulator needs to know beside the program itself."""

    ranks: tuple[tuple[Price, ...], ...]
    """As Program.ranks."""
    bandwidth: Mapping[str, float]
    """Bytes per second of every resource that traffic uses."""
    devices: tuple[str, ...]
    """By rank."""
    static_bytes: tuple[int, ...]
    """By rank: parameters, gradients, optimizer states and buffers."""
    micro_batch_bytes: tuple[float, ...]
    """By rank: activations that a forward leaves and the backward of its micro-batch frees."""
    overhead_seconds: float = 0.0
    """Fixed cost of a step outside all instructions."""


@record
class _Costs:
    """What the pricing of one plan looks up."""

    model: LayerGraph
    plan: Plan
    cluster: Cluster
    profile: Profile | None
    links: Topology
    step_latency: float
    """Fixed seconds of one step of a ring."""
    system: SystemConstants
    tables: MemoryTables
    types: dict[str, str]
    """Type name of every device."""
    reductions: dict[tuple[tuple[int, ...], int], Traffic] = field(default_factory=dict)
    """Collectives priced before, by members and bytes: all members ask for the same one."""
    crossings: dict[tuple[object, ...], Traffic] = field(default_factory=dict)
    """Broadcasts and gathers priced before."""
    weighed: dict[tuple[bool, tuple[int, int], int, int], StageMemory] = field(default_factory=dict)
    """By recomputation, layers, tensor width and rows."""


def price(
    program: Program,
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
) -> Prices:
    """The cost of every instruction of a plan's program, which may lack that of some ranks.

    Raises ClusterError where a device does not offer the model's precision.
    """
    costs = _Costs(
        model=model,
        plan=plan,
        cluster=cluster,
        profile=profile,
        links=topology(reached_links(cluster, profile)),
        step_latency=ring_step(profile),
        system=system_constants(profile.calibration if profile else None),
        tables=memory_tables(model, plan.job),
        types={device.name: device.type for device in devices_of(cluster)},
    )
    times = _Times(costs)
    ranks: dict[int, tuple[Price, ...]] = {}
    memory: dict[int, tuple[int, float]] = {}
    for stage in stage_seats(plan):
        for replica in stage.seats:
            present = [seat for seat in replica if program.ranks[seat.rank]]
            absent = [seat for seat in replica if not program.ranks[seat.rank]]
            ranks.update((seat.rank, ()) for seat in absent)
            memory.update((seat.rank, (0, 0.0)) for seat in absent)
            if not present:
                continue
            seconds = times.of_replica(stage, replica)
            for seat in present:
                ranks[seat.rank] = _prices(program.ranks[seat.rank], stage, seat, seconds, costs)
                memory[seat.rank] = _memory(stage, seat, costs)
    order = sorted(ranks)
    return Prices(
        ranks=tuple(ranks[rank] for rank in order),
        bandwidth=costs.links.capacities,
        devices=plan.devices,
        static_bytes=tuple(memory[rank][0] for rank in order),
        micro_batch_bytes=tuple(memory[rank][1] for rank in order),
        overhead_seconds=overhead_seconds(profile),
    )


def replica_seconds(
    model: LayerGraph,
    layers: tuple[int, int],
    computed: Sequence[LayerSeconds],
    links: Topology,
    devices: Sequence[str],
    rows: int,
    *,
    step_latency: float = 0.0,
) -> tuple[Array, Array]:
    """Forward and backward seconds of each layer of a stage on one tensor-parallel replica.

    `computed` holds the compute of every layer for each device type of the replica. The ranks meet
    in every layer's all-reduces, so the slowest sets the pace; all-reduces overlap nothing.
    `step_latency`: fixed seconds of one step of a ring.
    """
    first, last = layers
    forward = np.max([c.forward[first:last] for c in computed], axis=0)
    backward = np.max([c.backward[first:last] for c in computed], axis=0)
    if len(devices) > 1:
        cost: dict[float, float] = {}

        def reduce_seconds(sizes: tuple[float, ...]) -> float:
            for size in sizes:
                if size not in cost:
                    traffic = all_reduce(links, devices, size * rows, step_latency=step_latency)
                    cost[size] = alone_seconds(links, traffic)
            return sum(cost[size] for size in sizes)

        held = model.layers[first:last]
        forward = forward + [reduce_seconds(layer.forward_all_reduce_bytes) for layer in held]
        backward = backward + [reduce_seconds(layer.backward_all_reduce_bytes) for layer in held]
    return forward, backward


def repeated_seconds(model: LayerGraph, layers: tuple[int, int], forward: Array) -> Array:
    """Seconds that each layer of a stage that recomputes adds to its backward: its forward's."""
    repeats = np.array([recomputed(layer, len(model.layers)) for layer in range(*layers)])
    result: Array = forward * repeats
    return result


class _Times:
    """Layer times of replicas, each distinct one worked out once while a plan is priced."""

    def __init__(self, costs: _Costs) -> None:
        self.costs = costs
        self.computed: dict[tuple[str, int, int], LayerSeconds] = {}

    def of_replica(self, stage: StageSeats, replica: Sequence[Seat]) -> tuple[Array, Array]:
        costs, rows = self.costs, replica[0].rows[1] - replica[0].rows[0]
        kinds = dict.fromkeys(costs.types[seat.device] for seat in replica)
        for kind in kinds:
            if (kind, len(replica), rows) not in self.computed:
                self.computed[kind, len(replica), rows] = layer_seconds(
                    costs.model, costs.cluster.types[kind], len(replica), rows, costs.profile
                )
        computed = [self.computed[kind, len(replica), rows] for kind in kinds]
        devices = [seat.device for seat in replica]
        forward, backward = replica_seconds(
            costs.model,
            stage.layers,
            computed,
            costs.links,
            devices,
            rows,
            step_latency=costs.step_latency,
        )
        if stage.recompute:
            backward = backward + repeated_seconds(costs.model, stage.layers, forward)
        return forward, backward


def _prices(
    instructions: Sequence[Instruction],
    stage: StageSeats,
    seat: Seat,
    seconds: tuple[Array, Array],
    costs: _Costs,
) -> tuple[Price, ...]:
    inside = _backward_of_reductions(instructions)
    completes: dict[int, list[tuple[int, float]]] = {}
    for reduction, backward in inside.items():
        layer = completing_layer(instructions[reduction], stage.layers, costs.model)
        offset = float(seconds[1][layer - stage.layers[0] :].sum())
        offset += costs.system.reduction_delay * (float(seconds[1].sum()) - offset)
        completes.setdefault(backward, []).append((reduction, offset))
    step = optimizer_seconds(
        costs.cluster.types[costs.types[seat.device]],
        costs.plan.job.optimizer,
        float(stage_parameters(costs.tables.plain, stage.layers, len(stage.seats[seat.replica]))),
        costs.profile,
        costs.model.precision,
    )
    compute = {
        Op.FORWARD: float(seconds[0].sum()),
        Op.BACKWARD: float(seconds[1].sum()),
        Op.OPTIMIZER_STEP: step,
    }
    return tuple(
        Price(seconds=compute[i.op], completes=tuple(completes.get(index, ())))
        if i.op in COMPUTE
        else Price(traffic=_traffic(i, seat, costs), inside=inside.get(index))
        for index, i in enumerate(instructions)
    )


def _backward_of_reductions(instructions: Sequence[Instruction]) -> dict[int, int]:
    """Index of each REDUCE_GRAD to that of the backward after it; one after the last backward is
    complete when it is posted, and absent."""
    found: dict[int, int] = {}
    posted: list[int] = []
    for index, i in enumerate(instructions):
        if i.op is Op.REDUCE_GRAD:
            posted.append(index)
        elif i.op is Op.BACKWARD:
            found.update(dict.fromkeys(posted, index))
            posted = []
    return found


def _traffic(i: Instruction, seat: Seat, costs: _Costs) -> Traffic:
    """Of a message or a collective; receives move with their sends."""
    if i.op in RECEIVES:
        return NOTHING
    if i.ranks and (i.op in SENDS or i.op in GATHERED):
        key = (i.op, i.ranks, i.peer, i.bytes)
        if key not in costs.crossings:
            make = _broadcast if i.op in SENDS else _gather
            costs.crossings[key] = make(i, costs)
        return costs.crossings[key]
    return _message_or_sum(i, seat, costs)


def _message_or_sum(i: Instruction, seat: Seat, costs: _Costs) -> Traffic:
    devices = costs.plan.devices
    if i.op in SENDS:
        assert i.peer is not None
        return boundary_transfer(
            costs.links, seat.device, devices[i.peer], i.bytes, costs.system.boundary
        )
    size = i.bytes * (costs.system.gradient_width if i.op is Op.REDUCE_GRAD else 1.0)
    key = (i.ranks, i.bytes)
    if len(i.ranks) > 1 and key not in costs.reductions:
        members = [devices[rank] for rank in i.ranks]
        costs.reductions[key] = all_reduce(
            costs.links, members, size, step_latency=costs.step_latency
        )
    return costs.reductions.get(key, NOTHING)


def _broadcast(i: Instruction, costs: _Costs) -> Traffic:
    """Of a whole broadcast, for the first of its messages."""
    if i.peer != i.ranks[1]:
        return NOTHING
    chain = [costs.plan.devices[rank] for rank in i.ranks]
    passed = broadcast(costs.links, chain, i.bytes, step_latency=costs.step_latency)
    return replace(passed, latency=passed.latency + costs.system.boundary)


def _gather(i: Instruction, costs: _Costs) -> Traffic:
    members = [costs.plan.devices[rank] for rank in i.ranks]
    return all_gather(costs.links, members, i.bytes, step_latency=costs.step_latency)


def _memory(stage: StageSeats, seat: Seat, costs: _Costs) -> tuple[int, float]:
    """Bytes that a rank always holds, and those of one micro-batch."""
    rows = seat.rows[1] - seat.rows[0]
    tensor = len(stage.seats[seat.replica])
    key = (stage.recompute, stage.layers, tensor, rows)
    if key not in costs.weighed:
        table = table_of(costs.tables, stage)
        costs.weighed[key] = stage_memory(table, stage.layers, tensor, rows, 1)
    parts = costs.weighed[key]
    states = parts.parameters + parts.gradients + parts.optimizer
    framework = framework_bytes(costs.cluster.types[costs.types[seat.device]])
    return round(states + parts.buffers) + framework, float(parts.activations)

"""Prices every instruction of a program: seconds of compute, bytes of activations and traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cluster.topology import Resource, Topology, topology
from meshwright.cost.collective import (
    Traffic,
    all_gather,
    all_reduce,
    boundary_transfer,
    broadcast,
)
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.constants import SystemConstants, system_constants
from meshwright.cost.links import messages_queue, overhead_seconds, reached_links, ring_step
from meshwright.cost.memory import (
    MemoryTables,
    StageMemory,
    framework_bytes,
    half_bytes,
    memory_tables,
    together,
    weigh,
)
from meshwright.cost.profile import Profile
from meshwright.cost.times import ReplicaTimes, Times
from meshwright.cost.weights import rank_parameters
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.buckets import completing_layer, gradient_bytes
from meshwright.program.instructions import Instruction, Key, Program
from meshwright.program.operations import Op
from meshwright.records import record
from meshwright.stopping import look

NOTHING = Traffic(bytes_by_resource={})


@record
class Price:
    """Holds the price of one instruction on its rank."""

    seconds: float = 0.0
    """The seconds of a compute instruction, with the tensor-parallel all-reduces of its layers."""
    held: float = 0.0
    """The bytes of activations that a compute instruction adds: positive for a forward, from its
    start; negative for a backward, at its end."""
    traffic: Traffic = NOTHING
    """The traffic of a send (its receive moves with it) or of a collective."""
    inside: int | None = None
    """The index of the backward that completes the gradients of this REDUCE_GRAD."""
    completes: tuple[tuple[int, float], ...] = ()
    """For that backward: the index of each of its REDUCE_GRADs, with the seconds from its own start
    to the moment at which their gradients are complete."""


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


@record
class _Costs:
    """Holds the inputs and the caches of the pricing of one plan."""

    model: LayerGraph
    plan: Plan
    cluster: Cluster
    profile: Profile | None
    links: Topology
    step_latency: float
    """The fixed seconds of one step of a ring."""
    queued: bool
    """True if messages of several devices over one link pass one after another."""
    system: SystemConstants
    tables: MemoryTables
    types: dict[str, str]
    """The device type of every device, by name."""
    reductions: dict[tuple[tuple[int, ...], float], Traffic] = field(default_factory=dict)
    """The all-reduces priced so far, by members and bytes on the links: all members ask for the
    same one."""
    crossings: dict[tuple[object, ...], Traffic] = field(default_factory=dict)
    """The broadcasts and gathers priced so far."""
    weighed: dict[tuple[bool, tuple[int, int], int, int], StageMemory] = field(default_factory=dict)
    """The memory of stages weighed so far, by recomputation, layers, tensor width and rows."""


def price(
    program: Program,
    plan: Plan,
    model: LayerGraph,
    cluster: Cluster,
    profile: Profile | None = None,
) -> Prices:
    """Price every instruction of a plan's program; some ranks of it may have no instructions.

    Raises ClusterError if a device does not offer the model's precision.
    """
    costs = _Costs(
        model=model,
        plan=plan,
        cluster=cluster,
        profile=profile,
        links=topology(reached_links(cluster, profile)),
        step_latency=ring_step(profile),
        queued=messages_queue(cluster),
        system=system_constants(profile.calibration if profile else None),
        tables=memory_tables(model, plan.job),
        types={device.name: device.type for device in devices_of(cluster)},
    )
    times = Times(model, cluster, profile, costs.links, costs.step_latency)
    held: dict[int, dict[int, _Seated]] = {rank: {} for rank in range(len(plan.devices))}
    for stage in stage_seats(plan):
        look()
        for replica in stage.seats:
            if not any(program.ranks[seat.rank] for seat in replica):
                continue
            computes = ReplicaTimes(
                times,
                stage.layers,
                [costs.types[seat.device] for seat in replica],
                [seat.device for seat in replica],
                replica[0].rows[1] - replica[0].rows[0],
                recompute=stage.recompute,
            )
            for seat in replica:
                if program.ranks[seat.rank]:
                    held[seat.rank][stage.number] = _Seated(stage, seat, computes)
    return Prices(
        ranks=tuple(
            _prices(program.ranks[rank], own, costs) if own else () for rank, own in held.items()
        ),
        bandwidth=costs.links.capacities,
        devices=plan.devices,
        static_bytes=tuple(
            _static_bytes([(s.stage, s.seat) for s in own.values()], costs) if own else 0
            for own in held.values()
        ),
        overhead_seconds=overhead_seconds(profile),
    )


@dataclass(frozen=True, slots=True)
class _Seated:
    """Describes a rank's seat in one of its stages."""

    stage: StageSeats
    seat: Seat
    computes: ReplicaTimes


def _prices(
    instructions: Sequence[Instruction], own: dict[int, _Seated], costs: _Costs
) -> tuple[Price, ...]:
    """Price the instructions of one rank; `own` holds its seats by stage number."""
    look()
    inside = _backward_of_reductions(instructions)
    completes: dict[int, list[tuple[int, float]]] = {}
    for reduction, backward in inside.items():
        i, seated = instructions[backward], own[instructions[backward].stage]
        layers = seated.stage.layers
        seconds = seated.computes.of(i.op, _count(i))
        layer = completing_layer(instructions[reduction], layers, costs.model)
        offset = float(seconds[layer - layers[0] :].sum())
        offset += costs.system.reduction_delay * (float(seconds.sum()) - offset)
        completes.setdefault(backward, []).append((reduction, offset))
    known: dict[tuple[int, Op, int], Price] = {}
    found = []
    for index, i in enumerate(instructions):
        if i.op.kind != "compute":
            traffic = _traffic(i, own[i.stage].seat, costs)
            found.append(Price(traffic=traffic, inside=inside.get(index)))
            continue
        if i.op is Op.OPTIMIZER_STEP:
            found.append(_optimizer_price(i, instructions, own, costs))
            continue
        key = (i.stage, i.op, _count(i))
        if key not in known:
            known[key] = _compute_price(i, own, costs)
        if index in completes:
            found.append(replace(known[key], completes=tuple(completes[index])))
        else:
            found.append(known[key])
    return tuple(found)


def _tensor(stage: StageSeats, seat: Seat) -> int:
    """Return the tensor width of the replica that a rank belongs to."""
    return len(stage.seats[seat.replica])


def _count(i: Instruction) -> int:
    """Return the number of micro-batches that a compute instruction works on."""
    return 1 if i.micro_batches is None else i.micro_batches[1] - i.micro_batches[0]


def _compute_price(i: Instruction, own: dict[int, _Seated], costs: _Costs) -> Price:
    seated = own[i.stage]
    full = float(_weighed(seated.stage, seated.seat, costs).activations)
    rows = seated.seat.rows[1] - seated.seat.rows[0]
    tensor = _tensor(seated.stage, seated.seat)
    if i.op in (Op.FORWARD, Op.BACKWARD):
        held = full if i.op is Op.FORWARD else -full
    else:
        half = half_bytes(costs.tables, seated.stage, tensor, rows)
        held = half - full if i.op is Op.BACKWARD_INPUT else -half * _count(i)
    return Price(seconds=float(seated.computes.of(i.op, _count(i)).sum()), held=held)


def _optimizer_price(
    i: Instruction, instructions: Sequence[Instruction], own: dict[int, _Seated], costs: _Costs
) -> Price:
    """Price an optimizer step by the number of parameters that it updates.

    If a rank has several steps, each updates the parameters whose gradients are reduced under the
    same layers or tied name; the step without such reductions updates all other parameters. A
    single step updates every parameter of the rank.
    """
    seated = own[i.stage]
    steps = {(s.layers, s.tied) for s in instructions if s.op is Op.OPTIMIZER_STEP}
    summed: Counter[Key] = Counter()
    for each in instructions:
        if each.op is Op.REDUCE_GRAD and len(steps) > 1:
            summed[each.layers, each.tied] += each.bytes
    width, tensor = gradient_bytes(costs.plan.job), _tensor(seated.stage, seated.seat)
    if (i.layers, i.tied) in summed:
        parameters = summed[i.layers, i.tied] / width
    else:
        weights = costs.tables.plain.weights
        held = rank_parameters(weights, [s.stage for s in own.values()], tensor)
        parameters = held - summed.total() / width
    return Price(
        seconds=optimizer_seconds(
            costs.cluster.types[costs.types[seated.seat.device]],
            costs.plan.job.optimizer,
            max(parameters, 0.0),
            costs.profile,
            costs.model.precision,
        )
    )


def _backward_of_reductions(instructions: Sequence[Instruction]) -> dict[int, int]:
    """Map the index of each REDUCE_GRAD to that of its stage's last backward (B or W).

    A REDUCE_GRAD posted after that backward is left out: its gradients are complete already.
    """
    last = {i.stage: index for index, i in enumerate(instructions) if i.op.completes_gradients}
    return {
        index: last[i.stage]
        for index, i in enumerate(instructions)
        if i.op.of_gradients and last.get(i.stage, -1) > index
    }


def _traffic(i: Instruction, seat: Seat, costs: _Costs) -> Traffic:
    """Return the traffic of a message or a collective; a receive has none, it moves with its
    send."""
    if i.op.kind == "receive":
        return NOTHING
    if i.ranks and (i.op.kind == "send" or i.op.reads):
        key = (i.op, i.ranks, i.peer, i.bytes)
        if key not in costs.crossings:
            make = _broadcast if i.op.kind == "send" else _gather
            costs.crossings[key] = make(i, costs)
        return costs.crossings[key]
    return _message_or_sum(i, seat, costs)


def _message_or_sum(i: Instruction, seat: Seat, costs: _Costs) -> Traffic:
    """Return the traffic of a message between two ranks, or of an all-reduce."""
    devices = costs.plan.devices
    if i.op.kind == "send":
        assert i.peer is not None
        moved = boundary_transfer(
            costs.links, seat.device, devices[i.peer], i.bytes, costs.system.boundary
        )
        return replace(moved, sender=seat.device if costs.queued else None)
    size = i.bytes * (costs.system.gradient_width if i.op is Op.REDUCE_GRAD else 1.0)
    key = (i.ranks, size)
    if len(i.ranks) > 1 and key not in costs.reductions:
        members = [devices[rank] for rank in i.ranks]
        costs.reductions[key] = all_reduce(
            costs.links, members, size, step_latency=costs.step_latency
        )
    return costs.reductions.get(key, NOTHING)


def _broadcast(i: Instruction, costs: _Costs) -> Traffic:
    """Return the traffic of a whole broadcast for the first of its messages, and none for the
    others."""
    if i.peer != i.ranks[1]:
        return NOTHING
    chain = [costs.plan.devices[rank] for rank in i.ranks]
    passed = broadcast(costs.links, chain, i.bytes, step_latency=costs.step_latency)
    return replace(passed, latency=passed.latency + costs.system.boundary)


def _gather(i: Instruction, costs: _Costs) -> Traffic:
    """Return the traffic of an all-gather."""
    members = [costs.plan.devices[rank] for rank in i.ranks]
    return all_gather(costs.links, members, i.bytes, step_latency=costs.step_latency)


def _weighed(stage: StageSeats, seat: Seat, costs: _Costs) -> StageMemory:
    """Return the memory of a stage with one micro-batch in flight."""
    tensor, rows = _tensor(stage, seat), seat.rows[1] - seat.rows[0]
    key = (stage.recompute, stage.layers, tensor, rows)
    if key not in costs.weighed:
        costs.weighed[key] = weigh(costs.tables, stage, tensor, rows)
    return costs.weighed[key]


def _static_bytes(own: Sequence[tuple[StageSeats, Seat]], costs: _Costs) -> int:
    """Return the bytes that a rank holds whichever micro-batches are in flight."""
    parts = together(
        costs.tables.plain,
        [stage for stage, _ in own],
        _tensor(*own[0]),
        [_weighed(stage, seat, costs) for stage, seat in own],
    )
    device = costs.cluster.types[costs.types[own[0][1].device]]
    states = parts.parameters + parts.gradients + parts.optimizer
    return framework_bytes(device) + round(float(states + parts.buffers))

"""What each operation of a program costs on its rank: seconds, activations, traffic."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

from meshwright.cost.collective import Traffic, all_gather, all_reduce, boundary_transfer, broadcast
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.memory import half_bytes
from meshwright.cost.pricing_context import (
    NOTHING,
    Price,
    Pricing,
    PricingContext,
    RankContext,
    num_micro_batches,
    one_in_flight,
    tensor_width,
)
from meshwright.cost.weights import rank_parameters
from meshwright.program.buckets import gradient_bytes
from meshwright.program.instructions import Instruction, Key
from meshwright.program.operations import Op
from meshwright.techniques import rooms_with


@cache
def pricings() -> dict[Op, Pricing]:
    """The price of every operation, those of the techniques included."""
    own: dict[Op, Pricing] = {
        Op.FORWARD: compute_price,
        Op.BACKWARD: compute_price,
        Op.BACKWARD_INPUT: compute_price,
        Op.BACKWARD_WEIGHT: compute_price,
        Op.SEND_F: send_price,
        Op.SEND_B: send_price,
        Op.RECV_F: receive_price,
        Op.RECV_B: receive_price,
        Op.GATHER_F: gather_price,
        Op.GATHER_B: gather_price,
        Op.REDUCE_GRAD: reduce_price,
        Op.REDUCE_NORM: norm_price,
        Op.OPTIMIZER_STEP: optimizer_price,
    }
    for room in rooms_with("price"):
        own |= room.PRICES
    return own


def compute_price(i: Instruction, rank: RankContext) -> Price:
    """Price a forward, a backward or a part of one."""
    context, seated = rank.plan, rank.seat(i)
    full = float(one_in_flight(seated.stage, seated.seat, context).activations)
    rows = seated.seat.rows[1] - seated.seat.rows[0]
    tensor = tensor_width(seated.stage, seated.seat)
    if i.op in (Op.FORWARD, Op.BACKWARD):
        held = full if i.op is Op.FORWARD else -full
    else:
        half = half_bytes(context.tables, seated.stage, tensor, rows)
        held = half - full if i.op is Op.BACKWARD_INPUT else -half * num_micro_batches(i)
    return Price(seconds=float(seated.computes.of(i.op, num_micro_batches(i)).sum()), held=held)


def send_price(i: Instruction, rank: RankContext) -> Price:
    """Price a message; the first message of a broadcast pays for all of it."""
    assert i.peer is not None
    context, device = rank.plan, rank.seat(i).seat.device
    if not i.ranks:
        target = context.plan.devices[i.peer]
        moved = boundary_transfer(context.links, device, target, i.bytes, context.system.boundary)
        return Price(traffic=replace(moved, sender=device if context.queued else None))
    if i.peer != i.ranks[1]:
        return Price()
    key = (i.op, i.ranks, i.bytes)
    if key not in context.crossings:
        chain = [context.plan.devices[each] for each in i.ranks]
        passed = broadcast(context.links, chain, i.bytes, step_latency=context.step_latency)
        latency = passed.latency + context.system.boundary
        context.crossings[key] = replace(passed, latency=latency)
    return Price(traffic=context.crossings[key])


def receive_price(i: Instruction, rank: RankContext) -> Price:  # noqa: ARG001 - a Pricing
    """A receive costs nothing: it moves with its send."""
    return Price()


def gather_price(i: Instruction, rank: RankContext) -> Price:
    """Price an all-gather of activations or gradients in a replica."""
    context = rank.plan
    key = (i.op, i.ranks, i.bytes)
    if key not in context.crossings:
        members = [context.plan.devices[each] for each in i.ranks]
        context.crossings[key] = all_gather(
            context.links, members, i.bytes, step_latency=context.step_latency
        )
    return Price(traffic=context.crossings[key])


def reduce_price(i: Instruction, rank: RankContext) -> Price:
    """Price an all-reduce of gradients."""
    return Price(traffic=summed(i, i.bytes * rank.plan.system.gradient_width, rank.plan))


def norm_price(i: Instruction, rank: RankContext) -> Price:
    """Price the all-reduce of loss and norm."""
    return Price(traffic=summed(i, i.bytes * 1.0, rank.plan))


def summed(i: Instruction, size: float, context: PricingContext) -> Traffic:
    """Return the traffic of an all-reduce of `size` bytes among an instruction's ranks."""
    key = (i.ranks, size)
    if len(i.ranks) > 1 and key not in context.reductions:
        members = [context.plan.devices[each] for each in i.ranks]
        context.reductions[key] = all_reduce(
            context.links, members, size, step_latency=context.step_latency
        )
    return context.reductions.get(key, NOTHING)


def optimizer_price(i: Instruction, rank: RankContext) -> Price:
    """Price an optimizer step by the number of parameters that it updates."""
    return price_of_update(updated_parameters(i, rank), i, rank)


def price_of_update(parameters: float, i: Instruction, rank: RankContext) -> Price:
    """Price the update of a number of parameters on a rank's device."""
    context = rank.plan
    return Price(
        seconds=optimizer_seconds(
            context.cluster.types[context.types[rank.seat(i).seat.device]],
            context.plan.job.optimizer,
            max(parameters, 0.0),
            context.profile,
            context.model.precision,
        )
    )


def updated_parameters(i: Instruction, rank: RankContext) -> float:
    """Return the number of parameters that an optimizer step of a rank updates.

    If a rank has several steps, each updates the parameters whose gradients are reduced under the
    same layers or tied name; the step without such reductions updates all other parameters. A
    single step updates every parameter of the rank.
    """
    context, seated = rank.plan, rank.seat(i)
    steps = {(s.layers, s.tied) for s in rank.instructions if s.op is Op.OPTIMIZER_STEP}
    summed: Counter[Key] = Counter()
    for each in rank.instructions:
        if each.op.of_gradients and len(steps) > 1:
            summed[each.layers, each.tied] += each.bytes
    width, tensor = gradient_bytes(context.plan.job), tensor_width(seated.stage, seated.seat)
    if (i.layers, i.tied) in summed:
        return summed[i.layers, i.tied] / width
    weights = context.tables.plain.weights
    held = rank_parameters(weights, [s.stage for s in rank.stages.values()], tensor)
    return held - summed.total() / width

"""Prices the messages between stages, and the gathers of their parts."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost.collective import (
    Traffic,
    all_gather,
    boundary_transfer,
    broadcast,
    uncontended_seconds,
)
from meshwright.cost.operation_prices import collective
from meshwright.cost.pricing_context import Price, PricingContext, RankContext
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.techniques.pipeline_parallel.operations import GATHER_B, GATHER_F


def send_price(i: Instruction, rank: RankContext) -> Price:
    """Prices a message; the first message of a broadcast pays for all of it."""
    assert i.peer is not None
    context, device = rank.pricing, rank.stage_of(i).placement.device
    if not i.ranks:
        target = context.plan.devices[i.peer]
        moved = boundary_transfer(context.links, device, target, i.bytes, context.system.boundary)
        return _sent(replace(moved, sender=device if context.queued else None), context)
    if i.peer != i.ranks[1]:
        return Price()
    passed = collective(broadcast, i, i.bytes, context)
    return _sent(replace(passed, latency=passed.latency + context.system.boundary), context)


def _sent(traffic: Traffic, context: PricingContext) -> Price:
    """Prices a message, with the part of its time for which its sender waits."""
    exposure = context.system.send_exposure
    waits = exposure * uncontended_seconds(context.links, traffic) if exposure else 0.0
    return Price(seconds=waits, traffic=traffic)


def receive_price(i: Instruction, rank: RankContext) -> Price:  # noqa: ARG001 - a Pricing
    """Gives a receive no price: it moves with its send."""
    return Price()


def activation_gather_price(i: Instruction, rank: RankContext) -> Price:
    """Prices an all-gather of activations or gradients in a replica."""
    return Price(traffic=collective(all_gather, i, i.bytes, rank.pricing))


PRICES = {
    Op.SEND_F: send_price,
    Op.SEND_B: send_price,
    Op.RECV_F: receive_price,
    Op.RECV_B: receive_price,
    GATHER_F: activation_gather_price,
    GATHER_B: activation_gather_price,
}

"""Prices the reductions of gradients."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost.collective import all_reduce
from meshwright.cost.operation_prices import collective
from meshwright.cost.pricing_context import Price, PricingContext, RankContext
from meshwright.layout.shares import UNDIVIDED
from meshwright.program.instructions import Instruction
from meshwright.records import Seconds
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD

MOVED = 4
"""Times that a byte passes a device's memory when it is copied to be summed, and back: it is read
and written either way."""


def reduce_price(i: Instruction, rank: RankContext) -> Price:
    """Prices an all-reduce of gradients.

    Where replicas differ in tensor width, a share lies scattered in the gradients of narrow ones:
    they copy it into one piece before the sum, and back after it. All members wait for that.
    """
    size = i.bytes * rank.pricing.system.gradient_width
    traffic = collective(all_reduce, i, size, rank.pricing)
    if i.tile is not None and i.tile != UNDIVIDED:
        traffic = replace(traffic, latency=traffic.latency + _copy_seconds(i, rank.pricing))
    return Price(traffic=traffic)


def _copy_seconds(i: Instruction, context: PricingContext) -> Seconds:
    """Returns the seconds in which the slowest member copies a share there and back:

    4 * bytes / (memory bandwidth * its efficiency)
    """
    kinds = {context.links.devices[context.plan.devices[each]].type for each in i.ranks}
    types = (context.cluster.types[kind] for kind in kinds)
    slowest = min(kind.memory_bandwidth * kind.memory_efficiency for kind in types)
    return MOVED * i.bytes / slowest


PRICES = {REDUCE_GRAD: reduce_price}

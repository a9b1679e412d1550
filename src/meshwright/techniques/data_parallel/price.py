"""Prices the reductions of gradients."""

from __future__ import annotations

from meshwright.cost.collective import all_reduce
from meshwright.cost.operation_prices import collective
from meshwright.cost.pricing_context import Price, RankContext
from meshwright.program.instructions import Instruction
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD


def reduce_price(i: Instruction, rank: RankContext) -> Price:
    """Prices an all-reduce of gradients."""
    size = i.bytes * rank.pricing.system.gradient_width
    return Price(traffic=collective(all_reduce, i, size, rank.pricing))


PRICES = {REDUCE_GRAD: reduce_price}

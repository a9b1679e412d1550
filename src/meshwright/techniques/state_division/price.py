"""Prices the collectives of divided states."""

from __future__ import annotations

from meshwright.cost.collective import all_gather, all_reduce, reduce_scatter
from meshwright.cost.operation_prices import collective
from meshwright.cost.pricing_context import Price, RankContext
from meshwright.program.instructions import Instruction
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER


def gradient_scatter_price(i: Instruction, rank: RankContext) -> Price:
    """Prices a reduce-scatter of gradients: half an all-reduce, but a whole one over gloo, which
    carries it out as such."""
    size = i.bytes * rank.pricing.system.gradient_width
    kind = all_reduce if _over_gloo(i, rank) else reduce_scatter
    return Price(traffic=collective(kind, i, size, rank.pricing))


def parameter_gather_price(i: Instruction, rank: RankContext) -> Price:
    """Prices the all-gather of updated weights."""
    return Price(traffic=collective(all_gather, i, i.bytes, rank.pricing))


def _over_gloo(i: Instruction, rank: RankContext) -> bool:
    context = rank.pricing
    if all(kind.processor != "cpu" for kind in context.cluster.types.values()):
        return False
    members = (context.plan.devices[each] for each in i.ranks)
    return any(context.type_of(member).processor == "cpu" for member in members)


PRICES = {REDUCE_SCATTER: gradient_scatter_price, GATHER_PARAMETERS: parameter_gather_price}

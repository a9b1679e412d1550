"""Prices the collectives of divided states, and the update of a rank's share."""

from __future__ import annotations

from meshwright.cost.collective import Traffic, all_gather, all_reduce, reduce_scatter
from meshwright.cost.operation_prices import price_of_update, updated_parameters
from meshwright.cost.pricing_context import Price, RankContext
from meshwright.program.buckets import gradient_bytes
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER


def scatter_price(i: Instruction, rank: RankContext) -> Price:
    """Price a reduce-scatter of gradients: half an all-reduce, but a whole one over gloo, which
    carries it out as such."""
    size = i.bytes * rank.plan.system.gradient_width
    return Price(traffic=_ring(i, size, rank, scatters=not _over_gloo(i, rank)))


def gather_price(i: Instruction, rank: RankContext) -> Price:
    """Price the all-gather of updated weights."""
    return Price(traffic=_ring(i, float(i.bytes), rank, scatters=None))


def _ring(i: Instruction, size: float, rank: RankContext, *, scatters: bool | None) -> Traffic:
    """Price a collective once for all its members; `scatters` is None for an all-gather."""
    context = rank.plan
    key = (i.op, i.ranks, size)
    if key not in context.crossings:
        make = {None: all_gather, True: reduce_scatter, False: all_reduce}[scatters]
        members = [context.plan.devices[each] for each in i.ranks]
        latency = context.step_latency
        context.crossings[key] = make(context.links, members, size, step_latency=latency)
    return context.crossings[key]


def _over_gloo(i: Instruction, rank: RankContext) -> bool:
    context = rank.plan
    types = (context.types[context.plan.devices[each]] for each in i.ranks)
    return any(context.cluster.types[each].processor == "cpu" for each in types)


def update_price(i: Instruction, rank: RankContext) -> Price:
    """Price an optimizer step of which a rank carries out its share."""
    width = gradient_bytes(rank.plan.plan.job)
    steps = sum(each.op is Op.OPTIMIZER_STEP for each in rank.instructions)
    left = sum(
        each.bytes / width * (1 - 1 / len(each.ranks))
        for each in rank.instructions
        if each.op is REDUCE_SCATTER
        and (steps == 1 or (each.layers, each.tied) == (i.layers, i.tied))
    )
    return price_of_update(updated_parameters(i, rank) - left, i, rank)


PRICES = {
    REDUCE_SCATTER: scatter_price,
    GATHER_PARAMETERS: gather_price,
    Op.OPTIMIZER_STEP: update_price,
}

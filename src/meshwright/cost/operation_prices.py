"""Says what each operation of a program costs on its rank: seconds, activations, traffic."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache

from meshwright.cost.collective import Traffic, all_reduce
from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.memory import deferred_bytes
from meshwright.cost.pricing_context import (
    Collective,
    Price,
    PriceFunction,
    PricingContext,
    RankContext,
    one_micro_batch_memory,
)
from meshwright.cost.weights import rank_parameters
from meshwright.plan.ranks import gradient_bytes
from meshwright.program.instructions import GradientKey, Instruction, micro_batches_of
from meshwright.program.operations import Op
from meshwright.techniques import provided


@cache
def pricings() -> dict[Op, PriceFunction]:
    """Returns the pricing function of every operation, those of the techniques included."""
    own: dict[Op, PriceFunction] = {
        Op.FORWARD: compute_price,
        Op.BACKWARD: compute_price,
        Op.BACKWARD_INPUT: compute_price,
        Op.BACKWARD_WEIGHT: compute_price,
        Op.REDUCE_NORM: norm_price,
        Op.OPTIMIZER_STEP: optimizer_price,
    }
    for prices in provided("price", "PRICES"):
        own |= prices
    return own


def compute_price(i: Instruction, rank: RankContext) -> Price:
    """Prices a forward, a backward or a part of one."""
    context, seated = rank.pricing, rank.stage_of(i)
    full = float(one_micro_batch_memory(seated.stage, seated.placement, context).activations)
    rows = seated.placement.rows[1] - seated.placement.rows[0]
    tensor = seated.placement.width("tensor")
    if i.op in (Op.FORWARD, Op.BACKWARD):
        held = full if i.op is Op.FORWARD else -full
    else:
        key = (seated.stage.layers, tensor, rows)
        if key not in context.deferred:
            context.deferred[key] = deferred_bytes(context.tables, seated.stage, tensor, rows)
        half = context.deferred[key]
        held = half - full if i.op is Op.BACKWARD_INPUT else -half * len(micro_batches_of(i))
    work = float(seated.times.of(i.op, len(micro_batches_of(i))).sum())
    return Price(seconds=work + context.system.instruction, held_bytes=held)


def norm_price(i: Instruction, rank: RankContext) -> Price:
    """Prices the all-reduce of loss and norm."""
    return Price(traffic=collective(all_reduce, i, i.bytes, rank.pricing))


def collective(kind: Collective, i: Instruction, size: float, context: PricingContext) -> Traffic:
    """Returns the traffic of a collective of `size` bytes among an instruction's ranks."""
    key = (kind, i.ranks, size)
    if key not in context.collectives:
        members = [context.plan.devices[each] for each in i.ranks]
        context.collectives[key] = kind(
            context.links, members, size, step_latency=context.step_latency
        )
    return context.collectives[key]


def optimizer_price(i: Instruction, rank: RankContext) -> Price:
    """Prices an optimizer step by the number of parameters that it updates."""
    context = rank.pricing
    return Price(
        seconds=optimizer_seconds(
            context.type_of(rank.stage_of(i).placement.device),
            context.plan.job.optimizer,
            max(_updated_parameters(i, rank), 0.0),
            context.profile,
            context.model.precision,
        )
    )


def _updated_parameters(i: Instruction, rank: RankContext) -> float:
    """Returns the number of parameters that an optimizer step of a rank updates.

    If a rank has several steps, each updates the parameters whose gradients are reduced under the
    same layers or tied name; the step without such reductions updates all other parameters. A
    single step updates every parameter of the rank. Of gradients that were scattered it updates
    those that it has kept.
    """
    context, seated = rank.pricing, rank.stage_of(i)
    steps = {(s.layers, s.tied) for s in rank.instructions if s.op is Op.OPTIMIZER_STEP}
    summed: Counter[GradientKey] = Counter()
    elsewhere: dict[GradientKey, float] = defaultdict(float)
    for each in (each for each in rank.instructions if each.op.of_gradients):
        if len(steps) > 1:
            summed[each.layers, each.tied] += each.bytes
        if each.op.scatters:
            kept = each.bytes / len(each.ranks)
            elsewhere[each.layers, each.tied] += each.bytes - kept
    width, tensor = gradient_bytes(context.plan.job), seated.placement.width("tensor")
    if (i.layers, i.tied) in summed:
        key = (i.layers, i.tied)
        return (summed[key] - elsewhere[key]) / width
    weights = context.tables.plain.weights
    held = rank_parameters(weights, [s.stage for s in rank.stages.values()], tensor)
    return held - (summed.total() if len(steps) > 1 else sum(elsewhere.values())) / width

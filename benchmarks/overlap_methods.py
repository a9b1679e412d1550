"""Ways for stages to communicate that the simulator can tell apart, for overlap.py.

`posted` is what Meshwright does: sends and receives go on behind computation. `blocking` is a
pipeline that puts its communication among its computation, as frameworks do which give both to one
stream: both sides stop for it. `free` has no communication between stages at all, which no way of
overlapping can beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from meshwright.cluster.spec import Cluster
from meshwright.cost.collective import Traffic, concurrent
from meshwright.cost.pricing import Prices, price_program
from meshwright.cost.pricing_context import Price
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Instruction, Program
from meshwright.program.operations import MATCHING_RECEIVE, Op
from meshwright.program.orders import orders_of
from meshwright.simulate.simulator import simulate
from meshwright.techniques.pipeline_parallel.operations import GATHER_B, GATHER_F, GATHERS

Way = Literal["posted", "blocking", "free"]
Slot = tuple[float, Op, int, int]
"""When a crossing has its turn in the order of all groups; RECV_F or RECV_B; the stage that
receives; its micro-batch."""

READ_BY = {Op.FORWARD: Op.RECV_F, Op.BACKWARD: Op.RECV_B}


def step_seconds(
    plan: Plan, model: LayerGraph, cluster: Cluster, way: Way, profile: Profile | None = None
) -> float:
    """The step of a plan of one pipeline, one stage to a group, with whole backwards."""
    program = compile_plan(plan, model)
    prices = price_program(program, plan, model, cluster, profile)
    if way == "free":
        prices = without_crossings(program, prices)
    elif way == "blocking":
        program, prices = blocking(program, prices, orders_of(plan, 0))
    return simulate(program, prices).step_seconds


def without_crossings(program: Program, prices: Prices) -> Prices:
    """Messages between stages that take no time."""
    none = Traffic(bytes_by_resource={})
    ranks = tuple(
        tuple(
            replace(cost, traffic=none)
            if i.op.kind == "send" or i.op in (GATHER_F, GATHER_B)
            else cost
            for i, cost in zip(instructions, costs, strict=True)
        )
        for instructions, costs in zip(program.ranks, prices.ranks, strict=True)
    )
    return replace(prices, ranks=ranks)


def blocking(program: Program, prices: Prices, orders: Sequence[Order]) -> tuple[Program, Prices]:
    """Each crossing is one step that all ranks of both stages enter together and leave together,
    right before the computation that reads it; all ranks have these steps in one order, that of
    their readers on a clock where every computation takes one tick."""
    turns = _turns(orders)
    traffic = _traffic(program, prices)
    members: dict[int, set[int]] = {}
    for rank, instructions in enumerate(program.ranks):
        for i in instructions:
            if i.op in (Op.FORWARD, Op.BACKWARD):
                members.setdefault(i.stage, set()).add(rank)
    found = [
        _with_steps(rank, program.ranks[rank], prices.ranks[rank], turns, traffic, members)
        for rank in range(len(program.ranks))
    ]
    return (
        Program(ranks=tuple(tuple(i for i, _ in own) for own in found)),
        replace(prices, ranks=tuple(tuple(cost for _, cost in own) for own in found)),
    )


def _turns(orders: Sequence[Order]) -> dict[tuple[Op, int, int], float]:
    """Ticks at which computations (op, stage, micro-batch) begin, if all take one and messages
    take none."""
    began: dict[tuple[Op, int, int], float] = {}
    at = [0] * len(orders)
    tick = 0
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        ready = [g for g, order in enumerate(orders) if at[g] < len(order)
                 and _ready(order[at[g]][:3], began, tick, len(orders))]  # fmt: skip
        for g in ready:
            began[orders[g][at[g]][:3]] = tick
            at[g] += 1
        tick += 1
    return began


def _ready(
    action: tuple[Op, int, int], began: dict[tuple[Op, int, int], float], tick: int, stages: int
) -> bool:
    op, stage, m = action
    source = stage - 1 if op is Op.FORWARD else stage + 1
    return not 0 <= source < stages or began.get((op, source, m), tick) < tick


def _traffic(program: Program, prices: Prices) -> dict[tuple[Op, int, int], Traffic]:
    """Of all messages of a crossing at once, by the receive, its stage and micro-batch."""
    found: dict[tuple[Op, int, int], list[Traffic]] = {}
    for instructions, costs in zip(program.ranks, prices.ranks, strict=True):
        for i, cost in zip(instructions, costs, strict=True):
            if i.op.kind == "send":
                assert i.micro_batch is not None
                to = i.stage + 1 if i.op is Op.SEND_F else i.stage - 1
                key = MATCHING_RECEIVE[i.op], to, i.micro_batch
                found.setdefault(key, []).append(cost.traffic)
    return {key: concurrent(each) for key, each in found.items()}


def _with_steps(
    rank: int,
    instructions: Sequence[Instruction],
    costs: Sequence[Price],
    turns: dict[tuple[Op, int, int], float],
    traffic: dict[tuple[Op, int, int], Traffic],
    members: dict[int, set[int]],
) -> list[tuple[Instruction, Price]]:
    """One rank's list with steps in place of its messages."""
    steps = sorted(_slots(rank, turns, traffic, members))
    found: list[tuple[Instruction, Price]] = []
    moved: dict[int, int] = {}
    for index, (i, cost) in enumerate(zip(instructions, costs, strict=True)):
        if i.op.kind in ("send", "receive"):
            continue
        turn = turns.get((i.op, i.stage, -1 if i.micro_batch is None else i.micro_batch))
        if i.op is Op.REDUCE_NORM:
            turn = float("inf")
        while turn is not None and steps and steps[0][0] < turn:
            found.append(_step(steps.pop(0), traffic, members))
        moved[index] = len(found)
        found.append((i, cost))
    return [
        (i, replace(cost, completes=tuple((moved[r], offset) for r, offset in cost.completes)))
        for i, cost in found
    ]


def _slots(
    rank: int,
    turns: dict[tuple[Op, int, int], float],
    traffic: dict[tuple[Op, int, int], Traffic],
    members: dict[int, set[int]],
) -> Iterator[Slot]:
    """Of the crossings that a rank takes part in."""
    for (op, stage, m), turn in turns.items():
        receive = READ_BY[op]
        if (receive, stage, m) in traffic and rank in _both(receive, stage, members):
            yield turn - 0.5, receive, stage, m


def _both(receive: Op, stage: int, members: dict[int, set[int]]) -> set[int]:
    source = stage - 1 if receive is Op.RECV_F else stage + 1
    return members[stage] | members[source]


def _step(
    slot: Slot, traffic: dict[tuple[Op, int, int], Traffic], members: dict[int, set[int]]
) -> tuple[Instruction, Price]:
    """A collective of both stages that blocks, at the cost of the crossing's messages."""
    _, receive, stage, m = slot
    ranks = tuple(sorted(_both(receive, stage, members)))
    step = Instruction(op=GATHERS[receive], stage=stage, micro_batch=m, ranks=ranks)
    return step, Price(traffic=traffic[receive, stage, m])

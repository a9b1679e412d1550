"""Times a plan in any order of work without simulating it: its pipelines one by one, then the sums
of gradients that follow each stage's last backward.

Links that several cuts use are priced by the share of the time in which others use them; which
messages really meet is for the simulator to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from meshwright.cluster.topology import Topology
from meshwright.cost.collective import Traffic, concurrent, uncontended_seconds
from meshwright.cost.pricing import Prices, price_program
from meshwright.plan.ranks import stage_layout, stage_placements
from meshwright.plan.spec import Pipeline, Plan
from meshwright.program.actions import (
    Action,
    Order,
    format_order,
    single_action,
    with_joined_weights,
)
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Program, micro_batches_of
from meshwright.program.operations import Op
from meshwright.program.work import Work
from meshwright.search.boundary_prices import Crossing, crowded_seconds, mean_period
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import candidate_of
from meshwright.search.costs import Costs
from meshwright.search.pipeline_seconds import Span
from meshwright.search.reduction_estimate import alone_after, reduced
from meshwright.simulate.symmetry import find_symmetry, priced_for_all
from meshwright.techniques.pipeline_parallel.operations import GATHERS

PROBED = 4
"""Micro-batches of which one has a whole backward, one a backward in two parts, and two have weight
parts that are joined."""

THERE_AND_BACK = (Op.FORWARD, Op.BACKWARD)
PROBED_PARTS = ("compute", "transfers")
"""Parts of a step that are priced: the rest comes after the last backwards."""
GATHERED = frozenset(GATHERS.values())
WORKS = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)


Clock = Callable[[Sequence[list[Span]]], tuple[float, float]]
"""Returns the seconds of a plan's step, given the last backward of every stage in each of its
pipelines, and the part of them in which gradients are still summed though all backwards are
done."""


def quick_clock(costs: Costs, plan: Plan) -> Clock:
    """Returns a clock for the orders of one plan."""
    pipelines = [candidate_of(pipeline) for pipeline in plan.pipelines]
    after = after_pipelines(costs, pipelines)

    def clock(spans: Sequence[list[Span]]) -> tuple[float, float]:
        end = max(last for span in spans for _, last in span)
        summed = reduced(costs, pipelines, spans)
        return summed + after, summed - end

    return clock


def pipeline_works(plan: Plan, costs: Costs) -> list[Work]:
    """Returns what the stages of every pipeline of a plan do, in seconds and bytes. A stage takes
    as long as its slowest rank."""
    program, prices = _priced(plan, costs)
    by_stage = _by_stage(program, prices, costs.links)
    room = _rooms(plan, costs, prices)
    stages = stage_placements(plan)
    numbers = [[s.number for s in stages if s.pipeline == p] for p in range(len(plan.pipelines))]
    seconds = _transfers(plan, costs, program, prices, numbers, by_stage)
    last = [[by_stage.get((s, Op.BACKWARD), 0.0) for s in own] for own in numbers]
    after = alone_after(costs, [candidate_of(pipeline) for pipeline in plan.pipelines], last)
    works = []
    for pipeline, own, tails in zip(plan.pipelines, numbers, after, strict=True):

        def column(key: str, stages: list[int] = own) -> tuple[float, ...]:
            return tuple(by_stage.get((n, key), 0.0) for n in stages)

        weights = column(Op.BACKWARD_WEIGHT)
        works.append(
            Work(
                layout=stage_layout(pipeline),
                micro_batches=pipeline.micro_batches,
                forward=column(Op.FORWARD),
                whole=column(Op.BACKWARD),
                inputs=column(Op.BACKWARD_INPUT),
                weights=weights,
                onward=tuple(seconds.get((n, Op.SEND_F), 0.0) for n in own[:-1]),
                back=tuple(seconds.get((n, Op.SEND_B), 0.0) for n in own[1:]),
                full=column("full"),
                half=column("half"),
                room=tuple(room[own[held[0]]] for held in stage_layout(pipeline)),
                further=tuple(map(_more, column("joined"), weights)),
                afterwards=_tails(pipeline, tails),
            )
        )
    return works


def _more(two: float, one: float) -> float:
    """Returns what the second one adds."""
    return max(0.0, two - one)


def _tails(pipeline: Pipeline, by_stage: Sequence[float]) -> tuple[float, ...]:
    """Returns the seconds that each group goes on after its last backward; none for groups of
    several stages, which sum the gradients of one while they work on another."""
    layout = stage_layout(pipeline)
    divided = any(len(held) > 1 for held in layout)
    return () if divided else tuple(by_stage[stage] for (stage,) in layout)


def as_actions(pipeline: Pipeline, found: tuple[Order, ...]) -> tuple[str, ...]:
    """Returns orders as a plan writes them, weight parts that follow each other as one."""
    pairs = zip(map(with_joined_weights, found), stage_layout(pipeline), strict=True)
    return tuple(format_order(order, alone=len(held) == 1) for order, held in pairs)


def _priced(plan: Plan, costs: Costs) -> tuple[Program, Prices]:
    """Prices a few micro-batches of a plan with every kind of backward, on its cheapest ranks to
    simulate."""
    few = tuple(
        replace(p, micro_batches=PROBED, actions=_there_and_back(p)) for p in plan.pipelines
    )
    probe = replace(plan, schedule="custom", pipelines=few)
    folded = find_symmetry(plan, costs.cluster, costs.model)
    whole = compile_plan(probe, costs.model, only=folded.ranks)
    program = Program(
        ranks=tuple(tuple(i for i in own if i.op.part in PROBED_PARTS) for own in whole.ranks)
    )
    prices = price_program(
        program, probe, costs.model, costs.stated_cluster, costs.profile, times=costs.times
    )
    return program, priced_for_all(program, prices, folded)


def _there_and_back(pipeline: Pipeline) -> tuple[str, ...]:
    """Returns the probed micro-batches through all stages of any layout, one way of a backward
    after the other."""
    found = []
    for held in stage_layout(pipeline):
        own: list[Action] = []
        for together in ((0,), (1,), (2, 3)):
            own += (single_action(Op.FORWARD, s, m) for m in together for s in held)
            for s in reversed(held):
                if together == (0,):
                    own.append(single_action(Op.BACKWARD, s, 0))
                    continue
                own += (single_action(Op.BACKWARD_INPUT, s, m) for m in together)
                own.append(Action(Op.BACKWARD_WEIGHT, s, together[0], together[-1] + 1))
        found.append(tuple(own))
    return as_actions(pipeline, tuple(found))


def _by_stage(program: Program, prices: Prices, links: Topology) -> dict[tuple[int, str], float]:
    """Returns the most of any rank, by stage and kind of work, with the gathers before it."""
    found: dict[tuple[int, str], float] = {}

    def most(key: tuple[int, str], value: float) -> None:
        found[key] = max(found.get(key, 0.0), value)

    for instructions, own in zip(program.ranks, prices.ranks, strict=True):
        full: dict[int, float] = {}
        gathering = 0.0
        for i, cost in zip(instructions, own, strict=True):
            if i.op in GATHERED:  # what follows waits for it
                gathering += uncontended_seconds(links, cost.traffic)
            elif i.op is Op.BACKWARD_WEIGHT and len(micro_batches_of(i)) > 1:
                most((i.stage, "joined"), cost.seconds)
            elif i.op in WORKS:
                most((i.stage, i.op), cost.seconds + gathering)
                gathering = 0.0
                if i.op is Op.FORWARD:
                    full[i.stage] = cost.held_bytes
                    most((i.stage, "full"), cost.held_bytes)
                elif i.op is Op.BACKWARD_INPUT:
                    most((i.stage, "half"), full[i.stage] + cost.held_bytes)
    return found


def _transfers(
    plan: Plan,
    costs: Costs,
    program: Program,
    prices: Prices,
    numbers: Sequence[Sequence[int]],
    by_stage: dict[tuple[int, str], float],
) -> dict[tuple[int, Op], float]:
    """Returns the seconds of what each stage sends, onward and back, with all its replicas."""
    sent: defaultdict[tuple[int, Op], list[Traffic]] = defaultdict(list)
    for instructions, own in zip(program.ranks, prices.ranks, strict=True):
        for i, cost in zip(instructions, own, strict=True):
            if i.op.kind == "send" and i.micro_batch == 0:
                sent[i.stage, i.op].append(cost.traffic)
    periods: dict[int, float] = {}
    for pipeline, stages in zip(plan.pipelines, numbers, strict=True):
        held = [[stages[s] for s in own] for own in stage_layout(pipeline)]
        slowest = max(sum(by_stage[s, op] for s in own for op in THERE_AND_BACK) for own in held)
        period = mean_period(slowest, len(held), pipeline.micro_batches)
        periods |= dict.fromkeys(stages, period)
    capacity = costs.links.capacities
    messages = []
    for (stage, _), traffics in sent.items():
        all_of_them = concurrent(traffics)
        occupied = [(r, size / capacity[r]) for r, size in all_of_them.bytes_by_resource.items()]
        messages.append(Crossing(all_of_them.latency, occupied, periods[stage]))
    return dict(zip(sent, crowded_seconds(messages), strict=True))


def _rooms(plan: Plan, costs: Costs, prices: Prices) -> dict[int, float]:
    """Returns the bytes left for activations on the fullest rank of each stage."""
    rooms: dict[int, float] = {}
    for stage in stage_placements(plan):
        for placement in stage.mesh.members:
            if prices.ranks[placement.rank]:
                capacity = costs.cluster.types[costs.devices[placement.device].type].memory
                left = capacity - prices.static_bytes[placement.rank]
                rooms[stage.number] = min(rooms.get(stage.number, float("inf")), left)
    return rooms

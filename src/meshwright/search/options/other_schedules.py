"""Chooses the order in which the stages of the best plans work.

The search ranks plans in the orders 1F1B and GPipe, for which it has bounds. Then the best of them
are tried in every order that there is, and in one made for them by the list scheduler: program.work
times all, and the simulator runs the few fastest that fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from operator import itemgetter

from meshwright.cost.collective import Traffic, concurrent, uncontended_seconds
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import Prices
from meshwright.plan.ranks import (
    describe_plan,
    needed_layout,
    stage_layout,
    stage_placements,
)
from meshwright.plan.spec import Pipeline, Plan, ScheduleName
from meshwright.program.actions import Order, format_order, single_action
from meshwright.program.instructions import Program
from meshwright.program.operations import Op
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Work, seconds, to_codes, to_orders
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import candidate_of
from meshwright.search.costs import Costs, distinct_replicas, group_prefix
from meshwright.search.explore import is_large
from meshwright.search.finishing import PlanOption, Proposal, Proposals, Pruned
from meshwright.search.incumbent import Evaluated, Incumbent, work_of
from meshwright.search.list_scheduler.listing import NAMES, best_order
from meshwright.simulate.symmetry import find_symmetry, priced_for_all

FINALISTS, FINALISTS_OF_MANY = 5, 3
"""Plans of different builds that are tried in every order; on large clusters, where simulating each
takes a second, fewer. With five instead of three, one of 45 example cases gains 13 %."""

PLAYED = 2
"""Named orders of each that are simulated, beside the listed one."""

LISTED = 60_000
"""Actions that the list scheduler may look at for one pipeline."""

ROUGH = 0.01
"""Share by which program.work may be slower than the simulator."""

SCATTER = 0.01
"""Share by which a plan may be faster than what another finalist in its schedule lets expect."""

MOST_ACTIONS = 40_000
"""Forwards of all ranks beyond which a plan keeps its order: it would take too long to simulate."""


def propose(incumbent: Incumbent) -> Proposals:
    """Gives each finalist its fastest schedules with a rule, and one made for it.

    The least ratio of simulated to estimated seconds that a schedule with a rule has shown on one
    finalist is expected of it on the others too. An order made for one plan says nothing of others.
    """
    costs = incumbent.costs
    ratios: dict[ScheduleName, float] = {}

    def attempt(plan: Plan, took: float) -> Proposals:
        name = plan.schedule
        expected = took * ratios.get(name, 1 - ROUGH)
        if expected >= incumbent.limit * (1 + SCATTER):
            yield Pruned("slower in the stage-level simulation")
            return
        simulated = yield Proposal(plan, describe_plan(plan))
        if simulated and name != "list":
            ratios[name] = min(ratios.get(name, inf), simulated.seconds / took)

    for plan in (evaluated.plan for evaluated in finalists(incumbent)):
        if work_of(plan, find_symmetry(plan, costs.cluster)) > MOST_ACTIONS:
            yield Pruned("too large to try")
            continue
        works = pipeline_works(plan, costs)
        after = after_pipelines(costs, [candidate_of(pipeline) for pipeline in plan.pipelines])
        others = [each for each in in_named_orders(works) if each[1] != plan.schedule]
        for took, name in others[:PLAYED]:
            yield from attempt(replace(plan, schedule=name, prediction=None), took + after)
        listed = listed_orders(works, LISTED)
        if listed is not None:
            yield from attempt(in_listed_orders(plan, listed[1]), listed[0] + after)


OPTION = PlanOption("schedules", propose)


def finalists(incumbent: Incumbent) -> list[Evaluated]:
    """Returns the best plan of each build in which there is an order to choose and that could win
    by it."""
    builds: dict[str, Evaluated] = {}
    for evaluated in sorted(incumbent.others, key=lambda p: p.seconds):
        if any(len(p.stages) > 1 and p.micro_batches > 1 for p in evaluated.plan.pipelines):
            builds.setdefault(evaluated.plan.name, evaluated)
    hopeful = [
        p for p in builds.values() if _least_seconds(incumbent.costs, p.plan) < incumbent.limit
    ]
    return hopeful[: FINALISTS_OF_MANY if is_large(incumbent.costs) else FINALISTS]


def _least_seconds(costs: Costs, plan: Plan) -> float:
    """Returns the seconds that the busiest group computes, in any order of work, and all that comes
    after."""
    most = 0.0
    pipelines = [candidate_of(pipeline) for pipeline in plan.pipelines]
    for pipeline in pipelines:
        for stage, (a, b) in zip(pipeline.stages, pairwise(pipeline.bounds), strict=True):
            for group, rows in distinct_replicas(costs, stage.groups, stage.rows):
                forward, backward = group_prefix(costs, group, rows)
                each = forward[b] - forward[a] + backward[b] - backward[a]
                most = max(most, pipeline.micro_batches * each)
    return most + after_pipelines(costs, pipelines)


def in_named_orders(works: Sequence[Work]) -> list[tuple[float, ScheduleName]]:
    """Returns the schedules with a rule that these pipelines can have, each after its seconds;
    fastest first. Interleaving one stage of each device is eager 1F1B."""
    divided = any(len(held) > 1 for work in works for held in work.layout)
    ranked = [
        (max(_named_seconds(name, work) for work in works), name)
        for name in NAMES
        if (divided or not name.startswith("interleaved"))
        and not any(needed_layout(name, work.layout) for work in works)
    ]
    return sorted(ranked, key=itemgetter(0))


def in_listed_order(plan: Plan, works: Sequence[Work], looked_at: int) -> Plan | None:
    """Returns the plan with an order made for its pipelines' work; None if nothing fits."""
    made = listed_orders(works, looked_at)
    return in_listed_orders(plan, made[1]) if made else None


def listed_orders(
    works: Sequence[Work], looked_at: int
) -> tuple[float, list[tuple[Order, ...]]] | None:
    """Orders made for pipelines' work, after the seconds of the slowest; None if nothing fits."""
    slowest, found = 0.0, []
    for work in works:
        codes = best_order(work, looked_at)
        if codes is None:
            return None
        slowest = max(slowest, seconds(work, codes))
        found.append(to_orders(codes))
    return slowest, found


def in_listed_orders(plan: Plan, found: Sequence[tuple[Order, ...]]) -> Plan:
    """Returns the plan with an order for each of its pipelines."""
    pipelines = tuple(
        replace(pipeline, actions=as_actions(pipeline, order))
        for pipeline, order in zip(plan.pipelines, found, strict=True)
    )
    return replace(plan, schedule="list", pipelines=pipelines, prediction=None)


def _named_seconds(name: ScheduleName, work: Work) -> float:
    return seconds(work, to_codes(schedule_orders(name, work.layout, work.micro_batches)))


def as_actions(pipeline: Pipeline, found: tuple[Order, ...]) -> tuple[str, ...]:
    """Orders as a plan writes them."""
    pairs = zip(found, stage_layout(pipeline), strict=True)
    return tuple(format_order(order, alone=len(held) == 1) for order, held in pairs)


def pipeline_works(plan: Plan, costs: Costs) -> list[Work]:
    """Returns what the stages of every pipeline of a plan do, in seconds and bytes. A stage takes
    as long as its slowest rank; transfers share links with those of the same cut alone."""
    whole = _priced(plan, costs, Op.BACKWARD)
    split = _priced(plan, costs, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    stages = stage_placements(plan)
    by_stage = _by_stage(*split, costs)
    backward = _by_stage(*whole, costs)
    room = _rooms(plan, costs, split[1])
    works = []
    for p, pipeline in enumerate(plan.pipelines):
        own = [stage.number for stage in stages if stage.pipeline == p]
        cuts = own[:-1]

        def column(numbers: list[int], *key: object) -> tuple[float, ...]:
            return tuple(by_stage.get((n, *key), 0.0) for n in numbers)

        works.append(
            Work(
                layout=stage_layout(pipeline),
                micro_batches=pipeline.micro_batches,
                forward=column(own, Op.FORWARD),
                whole=tuple(backward[n, Op.BACKWARD] for n in own),
                inputs=column(own, Op.BACKWARD_INPUT),
                weights=column(own, Op.BACKWARD_WEIGHT),
                onward=column(cuts, Op.SEND_F),
                back=column(own[1:], Op.SEND_B),
                full=column(own, "full"),
                half=column(own, "half"),
                room=tuple(room[own[held[0]]] for held in stage_layout(pipeline)),
            )
        )
    return works


def _priced(plan: Plan, costs: Costs, *backward: Op) -> tuple[Program, Prices]:
    """Returns a single micro-batch of a plan, by its cheapest ranks to simulate."""
    single = tuple(
        replace(p, micro_batches=1, actions=_there_and_back(p, backward)) for p in plan.pipelines
    )
    probe = replace(plan, schedule="custom", pipelines=single)
    folded = find_symmetry(plan, costs.cluster)
    priced = PricedPlan(
        probe,
        costs.model,
        costs.stated_cluster,
        costs.profile,
        ranks=folded.ranks,
        links=costs.links,
    )
    return priced.program, priced_for_all(priced.program, priced.prices, folded)


def _there_and_back(pipeline: Pipeline, backward: tuple[Op, ...]) -> tuple[str, ...]:
    """Returns the actions that take one micro-batch through all stages of any layout and back, with
    backwards in these parts."""
    found = tuple(
        (
            *(single_action(Op.FORWARD, s, 0) for s in held),
            *(single_action(op, s, 0) for s in reversed(held) for op in backward),
        )
        for held in stage_layout(pipeline)
    )
    return as_actions(pipeline, found)


def _by_stage(program: Program, prices: Prices, costs: Costs) -> dict[tuple[object, ...], float]:
    """Returns the most of any rank, by stage and kind; transfers are those of all replicas."""
    found: dict[tuple[object, ...], float] = {}
    sent: defaultdict[tuple[object, ...], list[Traffic]] = defaultdict(list)

    def most(key: tuple[object, ...], value: float) -> None:
        found[key] = max(found.get(key, 0.0), value)

    for instructions, own in zip(program.ranks, prices.ranks, strict=True):
        full: dict[int, float] = {}
        for i, cost in zip(instructions, own, strict=True):
            if i.op.kind == "send":
                sent[i.stage, i.op].append(cost.traffic)
            elif i.op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
                most((i.stage, i.op), cost.seconds)
                if i.op is Op.FORWARD:
                    full[i.stage] = cost.held_bytes
                    most((i.stage, "full"), cost.held_bytes)
                elif i.op is Op.BACKWARD_INPUT:
                    most((i.stage, "half"), full[i.stage] + cost.held_bytes)
    for key, traffics in sent.items():
        found[key] = uncontended_seconds(costs.links, concurrent(traffics))
    return found


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

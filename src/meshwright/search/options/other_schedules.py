"""The last choice: in which order the stages of the best plans work.

The search ranks strategies in the best order of work that memory allows. Then the best of them are
tried in every order that there is, and in one made for them by the list scheduler: program.work
times all, and the simulator runs the few fastest that fit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from operator import attrgetter, itemgetter

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
from meshwright.program.work import Work, fits, seconds, to_codes, to_orders
from meshwright.search.bounds import after_pipelines
from meshwright.search.candidate import candidate_of, plan_of
from meshwright.search.candidate_estimate import candidate_seconds, exposed_reductions
from meshwright.search.costs import Costs
from meshwright.search.explore import is_large
from meshwright.search.finishing import PlanOption, Proposal, Proposals, Pruned
from meshwright.search.incumbent import SAME, Incumbent, Strategy, work_of
from meshwright.search.list_scheduler.listing import NAMES, best_order
from meshwright.search.options.boundary_kinds import wide_cuts, with_boundaries
from meshwright.simulate.symmetry import find_symmetry, priced_for_all

FINALISTS, FINALISTS_OF_MANY = 12, 5
"""Plans that are timed in every order; on large clusters, where simulating each takes a second,
fewer."""

SIMULATED = 4
"""Plans beside them that are fast in 1F1B or GPipe, as the simulator has found."""

PLAYED, PLAYED_WORK = 8, 24_000
"""Plans with an order that are simulated, and forwards of their ranks, about, if that is less."""

NAMED = 2
"""Orders with a rule of each plan that are considered, beside the listed one."""

GLANCED, LISTED = 12_000, 60_000
"""Actions that the list scheduler may look at for one pipeline of a finalist, and of the best."""

ROUGH = 0.01
"""Share by which program.work may be slower than the simulator."""

ALIKE = 2
"""Finalists that differ in their cuts or in the order of their stages alone."""

MOST_ACTIONS = 30_000
"""Forwards of simulated ranks beyond which a plan keeps its order: it would take too long."""


@dataclass(frozen=True, slots=True)
class _Ordered:
    """A plan in an order of work, timed by program.work."""

    seconds: float
    plan: Plan
    works: list[Work]
    after: float
    """Seconds after the last backward; `seconds` includes them."""
    exposed: float
    """Seconds of reductions after the last backward, by the closed form; `seconds` is without."""
    work: int
    """Forwards of the ranks that are simulated."""


def propose(incumbent: Incumbent) -> Proposals:
    """Time each finalist in the schedules with a rule and in one made for it, and propose the
    fastest few of all; then look longer for an order of the best one.

    A plan that could not win even if it hid all its reductions is not simulated.
    """
    costs = incumbent.costs
    every: list[_Ordered] = []
    for plan in finalists(incumbent, incumbent.limit * (1 + ROUGH)):
        if (work := work_of(plan, find_symmetry(plan, costs.cluster))) > MOST_ACTIONS:
            yield Pruned("too large to try")
        else:
            every += _ordered(costs, plan, work)
    every.sort(key=lambda each: each.seconds + each.exposed)
    played, work, best = 0, 0, None
    for before, each in zip([None, *every], every, strict=False):
        if before and _as_fast(before, each) and not is_large(costs):
            continue
        if played >= PLAYED or work > PLAYED_WORK or each.seconds * (1 - ROUGH) >= incumbent.limit:
            yield Pruned("slower by the quick clock")
            continue
        played, work = played + 1, work + each.work
        simulated = yield Proposal(each.plan, describe_plan(each.plan))
        if simulated and simulated is incumbent.best:
            best = each
    if best is not None:
        listed = listed_orders(best.works, LISTED)
        if listed is not None and listed[0] + best.after < best.seconds * (1 - SAME):
            plan = in_listed_orders(best.plan, listed[1])
            yield Proposal(plan, describe_plan(plan))


def _as_fast(one: _Ordered, other: _Ordered) -> bool:
    """True if two plans with an order differ in nothing that the quick clock can see."""
    return abs(one.seconds - other.seconds) + abs(one.exposed - other.exposed) < SAME * one.seconds


def _ordered(costs: Costs, plan: Plan, work: int) -> list[_Ordered]:
    """The plan in its fastest orders that fit: two with a rule, and one made for it."""
    works = pipeline_works(plan, costs)
    pipelines = [candidate_of(pipeline) for pipeline in plan.pipelines]
    after, exposed = after_pipelines(costs, pipelines), exposed_reductions(costs, pipelines)
    named = [
        _Ordered(
            took + after, replace(plan, schedule=name, prediction=None), works, after, exposed, work
        )
        for took, name in in_named_orders(works, fitting=True)[:NAMED]
    ]
    listed = listed_orders(works, LISTED if is_large(costs) else GLANCED)
    if listed is not None:
        ordered = in_listed_orders(plan, listed[1])
        named.append(_Ordered(listed[0] + after, ordered, works, after, exposed, work))
    return named


OPTION = PlanOption("schedules", propose)


def finalists(incumbent: Incumbent, limit: float = inf) -> list[Plan]:
    """The plans that are fastest in the best order of work, in less than `limit` seconds, if there
    is an order to choose; few of those that are much alike."""
    costs = incumbent.costs
    rated: dict[Strategy, float] = dict(incumbent.promising)
    plans: dict[Strategy, Plan] = {}
    for each in sorted(incumbent.others, key=attrgetter("seconds")):
        pipelines = tuple(candidate_of(pipeline) for pipeline in each.plan.pipelines)
        strategy: Strategy = ("1f1b", pipelines)
        plans.setdefault(strategy, each.plan)
        if strategy not in rated:
            rated[strategy] = candidate_seconds(costs, pipelines, "best")
    builds: Counter[object] = Counter()
    fastest: list[Strategy] = []
    seen: set[object] = set()
    for strategy in sorted(rated, key=rated.__getitem__):
        if rated[strategy] >= limit:
            break
        build = _build(strategy)
        # The same on other devices of the same kinds takes about the same time.
        same = strategy if is_large(costs) else (build, f"{rated[strategy]:.9g}")
        if _has_order(strategy) and builds[build] < ALIKE and same not in seen:
            builds[build] += 1
            seen.add(same)
            fastest.append(strategy)
    most = FINALISTS_OF_MANY if is_large(costs) else FINALISTS
    chosen = [plans.get(each) or _plan(incumbent, each) for each in fastest[:most]]
    hopeful = (plan for each, plan in plans.items() if _has_order(each) and plan not in chosen)
    by_name = {plan.name: plan for plan in reversed(list(hopeful))}
    simulated = [plan for plan in plans.values() if by_name.get(plan.name) is plan]
    return [*chosen, *simulated[:SIMULATED]]


def _has_order(strategy: Strategy) -> bool:
    """True if there is an order to choose."""
    return any(len(each.stages) > 1 for each in strategy[1])


def _plan(incumbent: Incumbent, strategy: Strategy) -> Plan:
    """The plan of a strategy; its boundaries are of the kind that the best plan has."""
    plan = plan_of(incumbent.costs, strategy[1], "1f1b", incumbent.cluster_print)
    best = incumbent.best.plan.pipelines if incumbent.best else ()
    kinds = Counter(s.boundary for p in best for s in p.stages if s.boundary)
    if not kinds:
        return plan
    return with_boundaries(plan, wide_cuts(plan), kinds.most_common(1)[0][0])


def _build(strategy: Strategy) -> object:
    """What tells a strategy from those that differ in cuts or in the order of their stages."""
    return tuple(
        (
            each.micro_batches,
            each.rows,
            tuple(sorted((len(stage.groups), len(stage.groups[0])) for stage in each.stages)),
        )
        for each in strategy[1]
    )


def in_named_orders(
    works: Sequence[Work], *, fitting: bool = False
) -> list[tuple[float, ScheduleName]]:
    """The schedules with a rule that these pipelines can have, after their seconds; fastest first.
    Interleaving one stage of each device is eager 1F1B. `fitting`: those alone whose activations
    fit."""
    divided = any(len(held) > 1 for work in works for held in work.layout)
    ranked = [
        (max(_named_seconds(name, work, fitting=fitting) for work in works), name)
        for name in NAMES
        if (divided or not name.startswith("interleaved"))
        and not any(needed_layout(name, work.layout) for work in works)
    ]
    return sorted((each for each in ranked if each[0] < inf), key=itemgetter(0))


def in_listed_order(plan: Plan, works: Sequence[Work], looked_at: int) -> Plan | None:
    """The plan in an order of its own, by its pipelines' work; None if nothing fits."""
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
    """The plan with an order for each of its pipelines."""
    pipelines = tuple(
        replace(pipeline, actions=as_actions(pipeline, order))
        for pipeline, order in zip(plan.pipelines, found, strict=True)
    )
    return replace(plan, schedule="list", pipelines=pipelines, prediction=None)


def _named_seconds(name: ScheduleName, work: Work, *, fitting: bool) -> float:
    codes = to_codes(schedule_orders(name, work.layout, work.micro_batches))
    return inf if fitting and not fits(work, codes) else seconds(work, codes)


def as_actions(pipeline: Pipeline, found: tuple[Order, ...]) -> tuple[str, ...]:
    """Orders as a plan writes them."""
    pairs = zip(found, stage_layout(pipeline), strict=True)
    return tuple(format_order(order, alone=len(held) == 1) for order, held in pairs)


def pipeline_works(plan: Plan, costs: Costs) -> list[Work]:
    """What the stages of every pipeline of a plan do, in seconds and bytes. A stage takes as long
    as its slowest rank; transfers share links with those of the same cut alone."""
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
    """A single micro-batch of a plan, by its cheapest ranks to simulate."""
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
    """One micro-batch through all stages of any layout, with backwards in these parts."""
    found = tuple(
        (
            *(single_action(Op.FORWARD, s, 0) for s in held),
            *(single_action(op, s, 0) for s in reversed(held) for op in backward),
        )
        for held in stage_layout(pipeline)
    )
    return as_actions(pipeline, found)


def _by_stage(program: Program, prices: Prices, costs: Costs) -> dict[tuple[object, ...], float]:
    """Return the most of any rank, by stage and kind; transfers are those of all replicas."""
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
    """Bytes left for activations on the fullest rank of each stage."""
    rooms: dict[int, float] = {}
    for stage in stage_placements(plan):
        for placement in stage.mesh.members:
            if prices.ranks[placement.rank]:
                capacity = costs.cluster.types[costs.devices[placement.device].type].memory
                left = capacity - prices.static_bytes[placement.rank]
                rooms[stage.number] = min(rooms.get(stage.number, float("inf")), left)
    return rooms

"""The last choice: in which order the stages of the best plans work.

The search ranks strategies in the best order of work that memory allows. Then the best of them are
tried in every order that there is, and in one made for them by the list scheduler: the quick clock
times all, and the simulator runs the few fastest that fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from operator import attrgetter, itemgetter

from meshwright.plan.ranks import describe_plan, needed_layout
from meshwright.plan.spec import Plan, ScheduleName
from meshwright.program.codes import Codes, to_orders
from meshwright.program.schedules import schedule_codes
from meshwright.program.work import Work, fits
from meshwright.search.candidate import candidate_of, micro_batch_sizes, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import Costs
from meshwright.search.finishing import PlanOption, Proposal, Proposals, Pruned
from meshwright.search.incumbent import SAME, Evaluated, Incumbent, Strategy, work_of
from meshwright.search.list_scheduler.listing import NAMES, best_order
from meshwright.search.list_scheduler.steady_state import last_of_many, played_spans
from meshwright.search.options.boundary_kinds import wide_cuts, with_boundaries
from meshwright.search.quick_clock import Clock, as_actions, pipeline_works, quick_clock
from meshwright.search.space import is_large

FINALISTS, FINALISTS_OF_MANY = 12, 8
"""Plans that are timed in every order; on large clusters, where simulating each takes a second,
fewer."""

SIMULATED = 4
"""Plans beside them that are fast in 1F1B or GPipe, as the simulator has found."""

PLAYED, PLAYED_WORK = 8, 24_000
"""Plans with an order that are simulated, and forwards of their ranks, about, if that is less."""

NAMED = 2
"""Orders with a rule of each plan that are considered, beside the listed one."""

LISTED_PLANS = 6
"""Plans for which an order is made."""

GLANCED, LISTED = 12_000, 60_000
"""Actions that the list scheduler may look at for one pipeline of a finalist, and of the best."""

ROUGH = 0.01
"""Share by which the quick clock may be slower than the simulator, or faster where messages do not
meet."""

SPREAD = 0.06
"""Share by which the closed form may overestimate what the simulator finds.
(`python benchmarks/closed_form.py`)"""

MARGINS = (1.1, 1.2, 1.35)
"""Times that messages are taken to last in orders for plans whose messages meet."""

MET, NEAR = 5, 1.06
"""Plans whose messages meet for which such orders are made: the fastest, in at most NEAR times the
seconds of the best."""

ALIKE, ALIKE_OF_MANY = 2, 4
"""Finalists that differ in their cuts or in the order of their stages alone; on large clusters,
those with micro-batches of the same size."""

MOST_ACTIONS = 30_000
"""Forwards of simulated ranks beyond which a plan keeps its order: it would take too long."""


@dataclass(frozen=True, slots=True)
class OrderedPlan:
    """Holds a plan in an order of work, timed by the quick clock."""

    seconds: float
    exposed: float
    """The part of the seconds in which gradients are still summed though all backwards are done."""
    unwritten: Plan
    """The plan with the name of its schedule, but without the actions of a listed one."""
    works: list[Work]
    orders: list[list[Codes]]
    margin: float = 1.0
    """Times that messages were taken to last when the order was made."""

    @property
    def plan(self) -> Plan:
        """Returns the plan as it is proposed."""
        if self.unwritten.schedule != "list":
            return self.unwritten
        pipelines = tuple(
            replace(pipeline, actions=as_actions(pipeline, to_orders(codes)))
            for pipeline, codes in zip(self.unwritten.pipelines, self.orders, strict=True)
        )
        return replace(self.unwritten, pipelines=pipelines)


def propose(incumbent: Incumbent) -> Proposals:
    """Proposes the finalists in their fastest orders."""
    chosen: list[tuple[Plan, int]] = []
    for plan in finalists(incumbent, incumbent.limit * (1 + SPREAD)):
        if (work := work_of(incumbent.costs, plan)) > MOST_ACTIONS:
            yield Pruned("too large to try")
        else:
            chosen.append((plan, work))
    yield from in_fastest_orders(incumbent, chosen, PLAYED)


def in_fastest_orders(
    incumbent: Incumbent, plans: Sequence[tuple[Plan, int]], most: int
) -> Proposals:
    """Times plans in the schedules with a rule, and the best of them in an order made for each;
    proposes the `most` fastest of all, and looks longer for an order of the best one, except on
    large clusters. With each plan come the forwards of the ranks that are simulated."""
    costs, large = incumbent.costs, is_large(incumbent.costs)
    named = [
        (ordered, work)
        for plan, work in plans
        if (ordered := in_named_orders(costs, plan, pipeline_works(plan, costs)))
    ]
    named.sort(key=lambda pair: pair[0][0].seconds)
    every = [(each, work) for ordered, work in named for each in ordered]
    for (first, *_), work in named[:LISTED_PLANS]:
        if (listed := _listed(costs, first, GLANCED)) is not None:
            every.append((listed, work))
    every.sort(key=lambda pair: pair[0].seconds)
    played, spent = 0, 0
    best: OrderedPlan | None = None
    before: OrderedPlan | None = None
    met: list[tuple[float, OrderedPlan, int]] = []
    for each, work in every:
        alike = before and _as_fast(before, each) and not large
        before = each
        if alike:
            continue
        least = (each.seconds - each.exposed) * (1 - ROUGH)
        if played >= most or spent > PLAYED_WORK or least >= incumbent.limit:
            yield Pruned("slower by the quick clock")
            continue
        played, spent = played + 1, spent + work
        simulated = yield proposal_of(each)
        if simulated and simulated is incumbent.best:
            best = each
        if simulated and simulated.seconds > each.seconds * (1 + ROUGH):
            met.append((simulated.seconds, each, work))
    if best is not None and not large:
        yield from _looked_for_longer(costs, best)
    best = yield from _with_margins(incumbent, met, PLAYED_WORK - spent)
    if best is not None and not large:
        yield from _looked_for_longer(costs, best)


def _looked_for_longer(costs: Costs, best: OrderedPlan) -> Proposals:
    """Proposes a better order for the best plan, if one is found in more time."""
    listed = _listed(costs, best, LISTED, best.margin)
    if listed is None or listed.orders == best.orders:
        return
    if best.margin > 1.0 or listed.seconds < best.seconds * (1 - SAME):
        yield proposal_of(listed)


def _with_margins(
    incumbent: Incumbent, met: Iterable[tuple[float, OrderedPlan, int]], left: int
) -> Generator[Proposal | Pruned, Evaluated | None, OrderedPlan | None]:
    """Proposes plans whose messages meet, as the simulator has found, in orders that would leave
    them more time; returns the best plan, if it is one of them. `left` is the work that may be
    simulated."""
    best: OrderedPlan | None = None
    plans: dict[int, tuple[float, OrderedPlan, int]] = {}
    for found in sorted(met, key=itemgetter(0)):
        plans.setdefault(id(found[1].works), found)
    for seconds, ordered, work in list(plans.values())[:MET]:
        seen = [ordered.orders]
        for margin in MARGINS:
            if seconds > NEAR * incumbent.limit or left <= 0:
                yield Pruned("slower by the quick clock")
                continue
            listed = _listed(incumbent.costs, ordered, GLANCED, margin)
            if listed is None or listed.orders in seen:
                continue
            seen.append(listed.orders)
            left -= work
            simulated = yield proposal_of(listed)
            if simulated and simulated is incumbent.best:
                best = listed
    return best


def proposal_of(ordered: OrderedPlan) -> Proposal:
    """Returns the plan as a proposal, named by what it is."""
    plan = ordered.plan
    return Proposal(plan, describe_plan(plan))


def _as_fast(one: OrderedPlan, other: OrderedPlan) -> bool:
    """True if two plans differ in nothing that the quick clock can see."""
    differ = abs(one.seconds - other.seconds) + abs(one.exposed - other.exposed)
    return differ < SAME * one.seconds


OPTION = PlanOption("schedules", propose)


def finalists(incumbent: Incumbent, limit: float = inf) -> list[Plan]:
    """Returns the plans that are fastest in the best order of work, in less than `limit` seconds,
    if there is an order to choose; few of those that are much alike."""
    large = is_large(incumbent.costs)
    most, alike = (FINALISTS_OF_MANY, ALIKE_OF_MANY) if large else (FINALISTS, ALIKE)
    rated, plans = rated_strategies(incumbent)
    builds: Counter[object] = Counter()
    fastest: list[Strategy] = []
    seen: set[object] = set()
    for strategy in sorted(rated, key=rated.__getitem__):
        if rated[strategy] >= limit:
            break
        # What most tells apart the few finalists of a large cluster is their micro-batches.
        build = micro_batch_sizes(strategy[1]) if large else _build(strategy)
        # The same on other devices of the same kinds takes about the same time.
        same = strategy if large else (build, f"{rated[strategy]:.9g}")
        if has_order(strategy) and builds[build] < alike and same not in seen:
            builds[build] += 1
            seen.add(same)
            fastest.append(strategy)
    chosen = [plans.get(each) or unordered_plan(incumbent, each) for each in fastest[:most]]
    hopeful = (plan for each, plan in plans.items() if has_order(each) and plan not in chosen)
    by_name = {plan.name: plan for plan in reversed(list(hopeful))}
    simulated = [plan for plan in plans.values() if by_name.get(plan.name) is plan]
    return [*chosen, *simulated[:SIMULATED]]


def rated_strategies(incumbent: Incumbent) -> tuple[dict[Strategy, float], dict[Strategy, Plan]]:
    """Returns the closed form's seconds, in the best order of work, of every strategy that was
    promising or simulated, and the fastest plan that was simulated of each."""
    rated: dict[Strategy, float] = dict(incumbent.promising)
    plans: dict[Strategy, Plan] = {}
    for each in sorted(incumbent.others, key=attrgetter("seconds")):
        pipelines = tuple(candidate_of(pipeline) for pipeline in each.plan.pipelines)
        strategy: Strategy = ("1f1b", pipelines)
        plans.setdefault(strategy, each.plan)
        if strategy not in rated:
            rated[strategy] = candidate_seconds(incumbent.costs, pipelines, "best")
    return rated, plans


def has_order(strategy: Strategy) -> bool:
    """True if there is an order to choose."""
    return any(len(each.stages) > 1 for each in strategy[1])


def unordered_plan(incumbent: Incumbent, strategy: Strategy) -> Plan:
    """Returns the plan of a strategy; its cuts are broadcasts if those of the best plan are: that
    is the kind that the closed form does not know."""
    plan = plan_of(incumbent.costs, strategy[1], "1f1b", incumbent.cluster_print)
    best = incumbent.best.plan.pipelines if incumbent.best else ()
    kinds = Counter(s.boundary for p in best for s in p.stages if s.boundary)
    if not kinds or kinds.most_common(1)[0][0] != "broadcast":
        return plan
    return with_boundaries(plan, wide_cuts(plan), "broadcast")


def _build(strategy: Strategy) -> object:
    """Returns a key that strategies share if only their cuts or order of stages differ."""
    return tuple(
        (
            each.micro_batches,
            each.rows,
            tuple(sorted((len(stage.groups), len(stage.groups[0])) for stage in each.stages)),
        )
        for each in strategy[1]
    )


def in_named_orders(costs: Costs, plan: Plan, works: list[Work]) -> list[OrderedPlan]:
    """Returns the plan in the NAMED fastest schedules with a rule that its pipelines can have and
    whose activations fit, fastest first. Interleaving one stage of each device is eager 1F1B."""
    divided = any(len(held) > 1 for work in works for held in work.layout)
    clock = quick_clock(costs, plan)
    rough: list[tuple[float, ScheduleName]] = []
    for name in NAMES:
        if name.startswith("interleaved") and not divided:
            continue
        if any(needed_layout(name, work.layout) for work in works):
            continue
        if all(fits(work, _codes(name, work)) for work in works):
            rough.append((clock([last_of_many(work, name) for work in works])[0], name))
    found = []
    for _, name in sorted(rough, key=itemgetter(0))[:NAMED]:
        orders = [_codes(name, work) for work in works]
        written = "list" if name.startswith("zb") else name  # their rules join no weight parts
        ordered = replace(plan, schedule=written, prediction=None)
        found.append(_timed(clock, ordered, works, orders))
    return sorted(found, key=attrgetter("seconds"))


def _codes(name: ScheduleName, work: Work) -> list[Codes]:
    return schedule_codes(name, work.layout, work.micro_batches)


def _listed(
    costs: Costs, ordered: OrderedPlan, looked_at: int, margin: float = 1.0
) -> OrderedPlan | None:
    """Returns a plan with an order made for it that is no worse on its own, but for the margin."""
    unwritten, works = ordered.unwritten, ordered.works
    return in_listed_order(costs, unwritten, works, looked_at, margin, ordered.orders)


def with_margin(work: Work, margin: float) -> Work:
    """Returns the work with messages that take `margin` times as long."""
    onward, back = (tuple(margin * each for each in way) for way in (work.onward, work.back))
    return replace(work, onward=onward, back=back)


def in_listed_order(
    costs: Costs,
    plan: Plan,
    works: list[Work],
    looked_at: int,
    margin: float = 1.0,
    known: Sequence[list[Codes] | None] = (),
) -> OrderedPlan | None:
    """Returns the plan with an order made for each of its pipelines; None if nothing fits. An order
    that is made as if messages took `margin` times as long bears that they wait for each other.
    `known` are orders that fit, which those made are to beat."""
    orders = []
    for work, other in zip_longest(works, known):
        codes = best_order(with_margin(work, margin), looked_at, other)
        if codes is None:
            return None
        orders.append(codes)
    listed = replace(plan, schedule="list", prediction=None)
    return _timed(quick_clock(costs, plan), listed, works, orders, margin)


def _timed(
    clock: Clock, plan: Plan, works: list[Work], orders: list[list[Codes]], margin: float = 1.0
) -> OrderedPlan:
    spans = [played_spans(work, codes) for work, codes in zip(works, orders, strict=True)]
    return OrderedPlan(*clock(spans), plan, works, orders, margin)

"""Zorse's space: groups of well-joined devices, of any types, as one chain of stages.

"Zorse: Optimizing LLM Training Efficiency on Heterogeneous GPU Clusters", MLSys 2026 (arXiv
2507.10392). The graph of links is cut into k groups, for every k, such that the best links stay
inside; every group is a stage without tensor parallelism whose devices share out the rows by speed.
A group may hold several stages in turn (ministages). Zorse also divides parameters and moves them
to the hosts' memory; here groups recompute where they would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations, permutations

from rival_searches import Draft, Found, drafts_by_speed, play_plan, search

from meshwright.plan.spec import Plan
from meshwright.search.costs import Costs, pair, seconds_per_byte
from meshwright.search.costs import pace as seconds_per_row
from meshwright.search.finishing import fits_in_memory
from meshwright.search.layer_partition import Stages
from meshwright.search.options.virtual_stages import DividedPlan, divided_plan
from meshwright.search.space import usable_devices

PERMUTED = 4
"""Groups that are put in every order; more are put in a few."""

MINISTAGES = (2, 4)
"""Stages of each group, beside one."""

Group = tuple[str, ...]


def zorse(costs: Costs) -> Found | None:
    """The best plan of Zorse's space; None if nothing in it fits."""
    drafts: list[Draft] = []
    for groups in bandwidth_groups(costs):
        if len(groups) <= len(costs.model.layers):
            for order in dict.fromkeys(_orders(costs, groups)):
                drafts += drafts_by_speed(costs, _stages(order))
    found = search(costs, drafts)
    return found and _in_ministages(costs, found)


def bandwidth_groups(costs: Costs) -> Iterator[tuple[Group, ...]]:
    """From one group for each device to one of all: the two groups with the best link between any
    of their devices are joined, the smallest of equals first."""
    groups: list[Group] = [(device.name,) for device in usable_devices(costs)]
    known: dict[tuple[str, str], float] = {}
    slopes = {
        frozenset((a, b)): _slope(costs, a[0], b[0], known) for a, b in combinations(groups, 2)
    }
    yield tuple(groups)
    while len(groups) > 1:
        left, right = min(
            combinations(groups, 2),
            key=lambda both: (slopes[frozenset(both)], len(both[0]) + len(both[1])),
        )
        joined = left + right
        at = groups.index(left)
        rest = [group for group in groups if group not in (left, right)]
        for other in rest:
            ways = slopes[frozenset((left, other))], slopes[frozenset((right, other))]
            slopes[frozenset((joined, other))] = min(ways)
        groups = [joined if group == left else group for group in groups if group != right]
        assert groups[at] == joined
        yield tuple(groups)


def _slope(costs: Costs, a: str, b: str, known: dict[tuple[str, str], float]) -> float:
    nodes = costs.devices[a].node, costs.devices[b].node
    if nodes not in known:
        known[nodes] = seconds_per_byte(costs, [pair(costs, a, b)])[1]
    return known[nodes]


def _orders(costs: Costs, groups: tuple[Group, ...]) -> Iterator[tuple[Group, ...]]:
    """All orders of a few groups; of many as they were joined, by speed, and by speed within each
    site, there and back."""
    if len(groups) <= PERMUTED:
        yield from permutations(groups)
        return
    site = {group: costs.devices[group[0]].site for group in groups}
    by_speed = sorted(groups, key=lambda group: _pace(costs, group))
    by_site = sorted(by_speed, key=lambda group: site[group])
    for order in (groups, tuple(by_speed), tuple(by_site)):
        yield order
        yield order[::-1]


def _pace(costs: Costs, group: Group) -> float:
    return 1 / sum(1 / seconds_per_row(costs, (name,)) for name in group)


def _stages(order: Sequence[Group]) -> Stages:
    return tuple(tuple((name,) for name in group) for group in order)


def _in_ministages(costs: Costs, found: Found) -> Found:
    """The plan with several stages on every group, where that is faster."""
    best = found
    for plan in chain.from_iterable(_divided(costs, found.plan, each) for each in MINISTAGES):
        seconds, _ = play_plan(costs, plan)
        if seconds < best.seconds:
            best = replace(best, plan=plan, seconds=seconds)
    return best


def _divided(costs: Costs, plan: Plan, each: int) -> Iterator[Plan]:
    found = divided_plan(costs, plan, "interleaved-1f1b", each)
    if isinstance(found, DividedPlan) and fits_in_memory(costs, found.plan):
        yield found.plan

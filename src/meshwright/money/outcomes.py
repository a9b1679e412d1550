"""Works out what a plan costs, and how well that serves a user's terms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from meshwright.cluster.catalog import catalog
from meshwright.cluster.entries import nearest_types
from meshwright.cluster.settings import nodes_named
from meshwright.cluster.spec import Cluster, devices_of, node_of
from meshwright.errors import LimitError, MoneyError, Problem
from meshwright.money.spec import Expense, HourlyPrices, Limit, MoneyTerms, Outcome
from meshwright.plan.spec import Job, Plan
from meshwright.text import did_you_mean
from meshwright.units import format_seconds

HOUR = 3600.0
"""Seconds for which an hourly price is paid."""

Merit = tuple[float, float, float]
"""How well an outcome serves a user's terms; the least is best. It holds how far the outcome misses
the limits, then what shall be least, then what decides if both are equal."""


@dataclass(frozen=True, slots=True)
class ClusterPrices:
    """Gives the hourly prices of the devices of one cluster."""

    prices: HourlyPrices
    types: dict[str, str]
    """Device type of each device."""
    nodes: dict[str, float]
    """Amount per hour of each node that is paid as a whole."""


def cluster_prices(
    prices: HourlyPrices, cluster: Cluster, other: Cluster | None = None
) -> ClusterPrices:
    """Returns what the devices of a cluster cost.

    Raises MoneyError for a device whose price is missing, and for names that mean nothing: a device
    type that neither the cluster nor the catalogue has, and a node that neither the cluster has nor
    the `other`, which it is compared with.
    """
    named = nodes_named(cluster) if prices.node else {}
    nodes: dict[str, float] = {}
    # The price of one node by its own name stands above that of all nodes of a `count`.
    for name, amount in sorted(prices.node.items(), key=lambda item: -len(named.get(item[0], ()))):
        nodes |= {node.name: amount for node in named.get(name, ())}
    known = {*named, *(nodes_named(other) if other and prices.node else ())}
    MoneyError.check(
        [*_unknown(prices, {*cluster.types}, known), *_missing(prices, cluster, nodes)]
    )
    types = {device.name: device.type for device in devices_of(cluster)}
    return ClusterPrices(prices, types, nodes)


def _unknown(prices: HourlyPrices, types: set[str], nodes: set[str]) -> Iterator[Problem]:
    for name in prices.device:
        if name not in types and name not in catalog():
            hint = nearest_types(name, dict.fromkeys(types)).partition("; or define")[0]
            wanted = "a device type of the cluster or the catalogue"
            yield Problem(prices.file, f"device.{name}", f"the device type {name!r}", wanted, hint)
    for name in prices.node:
        if name not in nodes:
            hint = did_you_mean(name, nodes) or f"Known: {', '.join(sorted(nodes)[:20])}."
            wanted = "a node of the cluster"
            yield Problem(prices.file, f"node.{name}", f"the node {name!r}", wanted, hint)


def _missing(prices: HourlyPrices, cluster: Cluster, nodes: Collection[str]) -> Iterator[Problem]:
    asked = {
        kind: node.name
        for node in reversed(cluster.nodes)
        if node.name not in nodes
        for kind in node.devices
    }
    for kind in sorted(asked.keys() - prices.device.keys()):
        wanted = f"the hourly price of {kind}, which node {asked[kind]} of {cluster.name} has"
        mend = f'write it under [device]: {kind} = "3.20 {prices.currency}/h"'
        yield Problem(prices.file, f"device.{kind}", "no price", wanted, mend)


def hourly_price(here: ClusterPrices, devices: Iterable[str]) -> float:
    """Returns what these devices cost an hour: each its own price, or that of its whole node."""
    total, whole = 0.0, set[str]()
    for device in devices:
        node = node_of(device)
        if node not in here.nodes:
            total += here.prices.device[here.types[device]]
        elif node not in whole:
            whole.add(node)
            total += here.nodes[node]
    return total


def idle_devices(here: ClusterPrices, devices: Collection[str]) -> tuple[int, int]:
    """Returns how many devices need not be rented if these are in use, and how many others are idle
    but paid for with their whole nodes."""
    nodes = {node_of(device) for device in devices} & here.nodes.keys()
    idle = here.types.keys() - frozenset(devices)
    paid = sum(node_of(device) in nodes for device in idle)
    return len(idle) - paid, paid


def outcome(here: ClusterPrices, job: Job, per_hour: float, step_seconds: float) -> Outcome:
    """Returns what a plan achieves and costs whose steps take `step_seconds`, on devices that cost
    `per_hour`."""
    per_step = per_hour * step_seconds / HOUR
    tokens = job.global_batch * job.sequence
    return Outcome(
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        expense=Expense(
            currency=here.prices.currency,
            per_hour=per_hour,
            per_step=per_step,
            per_token=per_step / tokens,
        ),
    )


def plan_outcome(here: ClusterPrices, plan: Plan, step_seconds: float) -> Outcome:
    """Returns what a plan achieves and costs. Devices that it leaves idle are not paid for."""
    return outcome(here, plan.job, hourly_price(here, plan.devices), step_seconds)


def excess(found: Outcome, limit: Limit) -> float:
    """Returns by what share an outcome misses a limit; at most 0 if it keeps it."""
    if limit.measure == "rate":
        return limit.bound / found.tokens_per_second - 1
    return _measured(found, limit) / limit.bound - 1


def _measured(found: Outcome, limit: Limit) -> float:
    return {
        "hour": found.expense.per_hour,
        "step": found.expense.per_step,
        "token": found.expense.per_token,
        "seconds": found.step_seconds,
        "rate": found.tokens_per_second,
    }[limit.measure]


def merit(found: Outcome, terms: MoneyTerms) -> Merit:
    """Returns how well an outcome serves the terms; the least is best. A lower bound of an outcome
    gives a lower bound of its merit."""
    missed = max((excess(found, limit) for limit in terms.limits), default=0.0)
    both = (found.step_seconds, found.expense.per_token)
    return (max(0.0, missed), *(both if terms.objective == "time" else both[::-1]))


def dominates(one: Outcome, other: Outcome) -> bool:
    """True if the first outcome is as fast and as cheap per token as the other, or better."""
    cheap = one.expense.per_token <= other.expense.per_token
    return cheap and one.tokens_per_second >= other.tokens_per_second


def front(outcomes: Sequence[Outcome]) -> tuple[int, ...]:
    """Returns the indices of the outcomes that no other one dominates, fastest first; of equal ones
    the first."""
    order = sorted(
        range(len(outcomes)),
        key=lambda i: (-outcomes[i].tokens_per_second, outcomes[i].expense.per_token, i),
    )
    kept: list[int] = []
    for index in order:
        if not kept or not dominates(outcomes[kept[-1]], outcomes[index]):
            kept.append(index)
    return tuple(kept)


def check_limits(found: Outcome, terms: MoneyTerms, what: str) -> None:
    """Raises LimitError if the plan that comes closest to the limits still misses one; `what`
    describes it."""
    LimitError.check(
        Problem(
            "--limit",
            "",
            f"no plan that keeps it; the nearest, {what}, has {missed_text(found, limit)}",
            f"{'at least' if limit.measure == 'rate' else 'at most'} {limit.text}",
            "widen the limit, or give it more devices to choose from",
        )
        for limit in terms.limits
        if excess(found, limit) > 0
    )


def misses(found: Outcome, terms: MoneyTerms) -> tuple[str, ...]:
    """Says of each limit that an outcome misses by how much: `misses the limit of 30 USD/h: 41.2
    USD/h, 37.3% too much`."""
    return tuple(
        f"misses the limit of {limit.text}: {missed_text(found, limit)}"
        for limit in terms.limits
        if excess(found, limit) > 0
    )


def missed_text(found: Outcome, limit: Limit) -> str:
    """Says by how much an outcome misses a limit: `41.2 USD/h, 37.3% too much`."""
    value, currency = _measured(found, limit), found.expense.currency
    texts = {
        "hour": f"{format_amount(value)} {currency}/h",
        "step": f"{format_amount(value)} {currency}/step",
        "token": f"{format_amount(1e6 * value)} {currency}/Mtoken",
        "seconds": f"{format_seconds(value)} a step",
        "rate": f"{value:,.0f} tokens/s",
    }
    share = value / limit.bound - 1
    return f"{texts[limit.measure]}, {abs(share):.1%} too {'few' if share < 0 else 'much'}"


def format_amount(amount: float) -> str:
    """Formats an amount of money with four digits: `0.01234`, `3.2`, `12,345`."""
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"

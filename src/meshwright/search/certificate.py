"""Computes a lower bound on the step time of every possible plan, under the same costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np

from meshwright.cluster.link_rates import BETWEEN
from meshwright.cost.collective import least_step_seconds
from meshwright.cost.compute import optimizer_seconds
from meshwright.model.spec import num_parameters
from meshwright.plan.spec import Prediction
from meshwright.search.bound_choices import choices_of
from meshwright.search.bound_gradients import gradient_seconds, late_seconds, node_tables
from meshwright.search.bound_paths import (
    LayerKinds,
    best_mixture,
    chain_seconds,
    free_bytes,
    layer_kinds,
    memory_mixture_seconds,
    wide_seconds,
)
from meshwright.search.costs import Array, Costs
from meshwright.search.space import usable_devices
from meshwright.units import format_seconds

CHAIN = "the layers one after another, each where it is fastest"
FLUID = "the work of all rows on all devices, and the way of each row through the layers"
MEMORY = (
    "the work of all rows on all devices, the way of each row through the layers, and the memory "
    "that holds its activations on the way"
)
WIDE = (
    "the work of all rows on the best number of devices, the way of each row through the layers, "
    "and the norm of the gradients over those devices"
)
SUMS = (
    "the work on one layer by the nodes that hold it, the way of a row to it and back, and the sum "
    "of its gradients between these nodes"
)
LATE = (
    "the work of all rows on the best number of devices, most of which wait at the end for the sum "
    "of a layer's gradients, the way of each row through the layers, and the norm of the gradients "
    "over those devices"
)
LAST = "the optimizer's step, which comes after all else; there was no time for a better bound"
CLOSE = 1.005
"""Factor to which a bound that depends on itself is worked out."""
EXHAUSTIVE = (
    "every plan of the space was looked at, in the orders 1F1B and GPipe, with states undivided"
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Holds seconds that no plan can beat, and the reason why."""

    seconds: float
    reason: str


def certificate(costs: Costs) -> Certificate:
    """Returns the best of four bounds, each with what must follow it.

    Every row of the batch takes a path through the layers: at each layer there is a device type, a
    tensor width, a number of rows that are computed together, and activations that are kept or
    computed again (`bound_choices`). The first bounds are least costs of a path (`bound_paths`): of
    its length alone, of its length and its work, of these and the memory that it takes, and of the
    first two on the best number of devices, with the norm's ring among these. Two more look at the
    nodes that hold a layer, and at the sums of gradients between them (`bound_gradients`). Then the
    optimizer: some device holds at least an equal share of the parameters.

    They hold for every plan whose tensor groups each stay inside a node, as all do that the search
    makes, and that fits in memory: any pipelines, cuts, rows, orders, kinds of backward, divided
    states and devices that are left out. They contain no transfers between stages, which other work
    may hide.
    """
    counts = Counter(device.type for device in usable_devices(costs))
    names = sorted(counts)
    number_K = np.array([float(counts[name]) for name in names])
    batch = costs.job.global_batch
    choices = choices_of(costs, names)
    if not np.isfinite(choices.work).any(axis=1).all():
        return Certificate(float("inf"), CHAIN)  # a layer fits nowhere
    kinds, tables = layer_kinds(choices), node_tables(costs, names, choices)
    mixture, ring = best_mixture(kinds, number_K, batch), least_ring_seconds(costs)
    whole = wide_seconds(kinds, number_K, batch, ring)

    def late(within: float) -> float:
        return wide_seconds(kinds, number_K, batch, ring, late_seconds(tables, within))

    bounds = {
        CHAIN: chain_seconds(kinds),
        FLUID: mixture.seconds,
        MEMORY: memory_mixture_seconds(kinds, mixture, batch, free_bytes(costs)),
        WIDE: whole,
        LATE: least_step(late, whole),
        SUMS: gradient_seconds(tables, _early_seconds(kinds, number_K, batch, ring)),
    }
    reason = max(bounds, key=bounds.__getitem__)
    return Certificate(bounds[reason] + _after(costs, counts), reason)


def _early_seconds(
    kinds: LayerKinds, number_K: Array, batch: int, ring: Callable[[int], float]
) -> float:
    """Returns the bounds of work on all devices and on their best number, without gradients of
    weights."""
    early = replace(kinds, choices=replace(kinds.choices, work=kinds.choices.early))
    return max(
        best_mixture(early, number_K, batch).seconds, wide_seconds(early, number_K, batch, ring)
    )


def least_step(bound: Callable[[float], float], least: float) -> float:
    """Returns the largest number of seconds found of which the step cannot be shorter.

    `bound(x)` bounds steps that take less than x, so every step takes min(x, bound(x)). A larger x
    makes it no larger. `least` bounds every step.
    """
    low, high = least, min(2 * least, bound(least))
    while high > low * CLOSE:
        x = (low + high) / 2
        found = bound(x)
        if found >= x:
            low = x
        else:
            low, high = max(low, found), x
    return low


def certificate_in_haste(costs: Costs) -> Certificate:
    """Returns a bound that holds and takes no time: what comes after the last pipeline."""
    counts = Counter(device.type for device in usable_devices(costs))
    return Certificate(_after(costs, counts), LAST)


def least_ring_seconds(costs: Costs) -> Callable[[int], float]:
    """Returns the least latency of a ring, as a function of its number of devices. Even a ring that
    fits in one node may be on several nodes, whose network may be quicker."""
    nodes, sites = costs.cluster.nodes, costs.cluster.sites
    direct = [each.link for each in costs.cluster.direct]
    outside = [*(node.network for node in nodes), *direct]
    own = [*(n.inside for n in nodes), *(n.islands.link for n in nodes if n.islands)]
    network = min(node.network.latency for node in nodes)
    widest = max(len(node.devices) for node in nodes)
    held = Counter(d.site for d in costs.devices.values())
    largest, across = max(held.values()), 0.0
    uplinks = sorted(s.uplink.latency if s.uplink else 0.0 for s in sites if held[s.name])
    if len(uplinks) > 1 and not direct:
        across = network + uplinks[1]  # the slower end of the quickest pair
    trees = any(link.kind in BETWEEN for link in outside)
    between, anywhere = (min(map(least_step_seconds, x)) for x in (outside, [*outside, *own]))

    def seconds(number: int) -> float:
        if number < 2:
            return 0.0
        step = max(between if number > widest else anywhere, costs.step_latency)
        step = max(step, across) if number > largest else step
        if not trees:
            return 2 * (number - 1) * step
        # On m nodes, l members on each, l - 1 + log2(m) steps there and back: log2(l m) or more.
        over = max(-(-number // widest), 1 + (number > largest))
        tree = 2 * ceil(log2(over)) * max(between, across if number > largest else 0.0)
        slowest = 2 * (number - 1) * costs.step_latency
        return max(2 * ceil(log2(number)) * anywhere, tree, slowest)

    return seconds


def _after(costs: Costs, counts: Counter[str]) -> float:
    """Returns the least seconds of the optimizer, and the overhead of a step."""
    share = num_parameters(costs.model) / sum(counts.values())
    step = min(
        optimizer_seconds(
            costs.cluster.types[kind],
            costs.job.optimizer,
            share,
            costs.profile,
            costs.model.precision,
        )
        for kind in counts
    )
    return step + (costs.profile.step_overhead_seconds if costs.profile else 0.0)


def sentence(prediction: Prediction) -> str:
    """Formats the bound: `at most 3.1 % above the best possible (1.2 s: ...)`, or nothing."""
    bound = prediction.lower_bound_seconds
    if not bound:
        return ""
    above = prediction.step_seconds / bound - 1
    if prediction.bound_reason == EXHAUSTIVE:
        return f"the best possible: {EXHAUSTIVE}"
    limit = format_seconds(bound)
    return f"at most {above:.1%} above the best possible ({limit}: {prediction.bound_reason})"

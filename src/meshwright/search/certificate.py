"""Computes a lower bound on the step time of every possible plan, under the same costs.

Letters: L layers, K device types, w a price for a second on a device of each type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meshwright.cost.compute import optimizer_seconds
from meshwright.cost.memory import usable_bytes
from meshwright.model.spec import num_parameters
from meshwright.plan.spec import Prediction
from meshwright.search.costs import Array, Costs, layer_times
from meshwright.search.space import usable_devices
from meshwright.stopping import raise_if_stopped
from meshwright.techniques.backward_split.price import backward_shares
from meshwright.units import format_seconds

FLUID = "all work spread over all devices without loss"
CHAIN = "the layers one after another, each where it is fastest"
WIDE = "all work spread over the best number of devices, and the norm of the gradients over those"
LAST = "the optimizer's step, which comes after all else; there was no time for a better bound"
EXHAUSTIVE = (
    "every plan of the space was looked at, in the orders 1F1B and GPipe, with states undivided"
)

GROWTH = 1.02
"""Numbers of devices that are bounded together differ by this factor."""

EVERY_ROW_COUNT = 512
"""Row counts up to this one are each priced where layer times were measured."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Seconds that no plan can beat, and why."""

    seconds: float
    reason: str


def certificate(costs: Costs) -> Certificate:
    """The best of three bounds, each with what must follow it.

    Fluid: with e(l, k) the least device-seconds per row of layer l on type k, over all tensor
    widths and rows per micro-batch that memory allows, n(k) devices of each type, and any prices
    w >= 0 with sum n(k) w(k) = 1,

        T >= rows * sum over l of min over k of w(k) e(l, k)

    because a step of T seconds sells no more than T at these prices (linear programming duality;
    the w only decide how tight it is). Wide: the same for every number of devices in use, to which
    the latency of the norm's ring is added, as `_wide_seconds` has it. Chain: one row passes every
    layer forward, then every layer backward; of a backward in two parts, the gradients of the
    weights keep nobody waiting but at the first layer. Then the optimizer: some device holds at
    least an equal share of the parameters.
    """
    devices = usable_devices(costs)
    counts = Counter(device.type for device in devices)
    kinds = sorted(counts)
    widths = range(1, max(len(node.devices) for node in costs.cluster.nodes) + 1)
    layers = len(costs.model.layers)
    work_LK = np.full((layers, len(kinds)), np.inf)
    least_L = np.full(layers, np.inf)
    for k, kind in enumerate(kinds):
        for tensor in widths:
            work, once = _layer_bounds(costs, kind, tensor)
            work_LK[:, k] = np.minimum(work_LK[:, k], work)
            least_L = np.minimum(least_L, once)
    after = _after(costs, counts)
    number_K = np.array([float(counts[kind]) for kind in kinds])
    fluid = costs.job.global_batch * fluid_seconds(work_LK, number_K)
    wide = _wide_seconds(costs, costs.job.global_batch * work_LK, number_K)
    chain = float(least_L.sum())
    bounds = {CHAIN: chain, FLUID: fluid, WIDE: wide}
    reason = max(bounds, key=bounds.__getitem__)
    return Certificate(bounds[reason] + after, reason)


def certificate_in_haste(costs: Costs) -> Certificate:
    """A bound that holds and takes no time: what comes after the last pipeline."""
    counts = Counter(device.type for device in usable_devices(costs))
    return Certificate(_after(costs, counts), LAST)


def _layer_bounds(costs: Costs, kind: str, tensor: int) -> tuple[Array, Array]:
    """Returns for every layer the least device-seconds per row, and least seconds of a micro-batch,
    on `tensor` devices of a type; infinite where the layer cannot be there."""
    most = _most_rows(costs, kind, tensor)
    work, once = np.full(len(most), np.inf), np.full(len(most), np.inf)
    for rows in _row_counts(costs, int(most.max(initial=0))):
        raise_if_stopped()
        whole, passed = _least_seconds(costs, kind, tensor, rows)
        allowed = rows <= most
        work = np.where(allowed, np.minimum(work, tensor * whole / rows), work)
        once = np.where(allowed, np.minimum(once, passed), once)
    # Between the row counts that are priced, seconds per row only fall: a layer that memory holds
    # to fewer rows than were priced is bounded by the next larger count.
    larger = _row_counts(costs, costs.job.global_batch)
    for layer in np.flatnonzero(most >= 1):
        above = next(rows for rows in larger if rows >= most[layer])
        whole, _ = _least_seconds(costs, kind, tensor, above)
        work[layer] = min(work[layer], tensor * float(whole[layer]) / above)
    return work, once


def _least_seconds(costs: Costs, kind: str, tensor: int, rows: int) -> tuple[Array, Array]:
    """Least seconds of a micro-batch on every layer, its backward whole or in two parts: of all its
    work, and of what the layer before it waits for."""
    times = layer_times(costs, kind, tensor, rows)
    device = costs.cluster.types[kind]
    shares = backward_shares(costs.model, device, tensor, rows, costs.profile)
    both = np.minimum(shares.sum(axis=1), 1.0)
    waited = np.minimum(shares[:, 0], 1.0)
    waited[0] = both[0]
    return times.forward + times.backward * both, times.forward + times.backward * waited


def _row_counts(costs: Costs, most: int) -> list[int]:
    """Rows per micro-batch to price. The roofline's seconds per row never rise with the rows, so
    that the first and the last count are enough; measured times may do anything."""
    if most < 1:
        return []
    if costs.profile is None:
        powers = [1 << i for i in range(most.bit_length())]
        return sorted({*powers, most})
    sizes = {entry.rows for entry in costs.profile.layers if entry.rows <= most}
    return sorted({*range(1, min(most, EVERY_ROW_COUNT) + 1), *sizes, most})


def _most_rows(costs: Costs, kind: str, tensor: int) -> Array:
    """Return how many rows of each layer's saved tensors a device can hold.

    Beside them it holds the layer's own parameters. Of their optimizer states it has at least an
    equal share of what all devices together must have: a plan may divide them. The number is 0
    where not one row fits or the width does not divide the layer.
    """
    room, unit, found = usable_bytes(costs.cluster.types[kind]), costs.table.weights.unit, []
    holders = len(usable_devices(costs))
    each = unit.weights + unit.gradients + unit.optimizer / holders + unit.casts
    for layer in costs.model.layers:
        own = layer.along("tensor")
        divided = 1 - 1 / tensor if own.units else 0.0
        held = (layer.parameters - own.parameters * divided) * each
        held += (layer.frozen_parameters - own.frozen_parameters * divided) * unit.weights
        saved = layer.saved_bytes - own.saved_bytes * divided
        rows = costs.job.global_batch if room >= held else 0
        if rows and saved > 0:
            rows = min(rows, int((room - held) / saved))
        found.append(0 if own.units % tensor else rows)
    return np.array(found, dtype=np.float64)


def fluid_seconds(work_LK: Array, number_K: Array, *, rounds: int = 200) -> float:
    """The best lower bound found on the seconds per row of all layers spread over all devices.

    Prices start where every type is worth its speed; subgradient steps then raise those of the
    types that the layers crowd on.
    """
    fit = np.isfinite(work_LK).any(axis=0)
    work, number = work_LK[:, fit], number_K[fit]
    if not fit.any() or not np.isfinite(work).any(axis=1).all():
        return float("inf")
    known = np.where(np.isfinite(work), work, np.nan)
    price = 1 / np.maximum(np.nansum(known, axis=0), 1e-300)
    best = 0.0
    for turn in range(rounds):
        price = price / (number @ price)
        bought = work * price
        chosen = bought.argmin(axis=1)
        picked = np.arange(len(work)), chosen
        value = float(bought[picked].sum())
        best = max(best, value)
        crowd = np.bincount(chosen, weights=work[picked], minlength=len(number)) / number
        if crowd.sum() == 0:
            break
        price = price * np.exp(0.5 / (1 + turn) * (crowd / crowd.max() - 0.5))
    return best


def _wide_seconds(costs: Costs, work_LK: Array, number_K: Array) -> float:
    """Least seconds, over all numbers of devices, of their work and of the norm among them.

    n devices, at most N(k) of a type, sell no more than T at prices w(k) = max(s(k), s) / D with
    D = sum N(k) max(s(k) - s, 0) + n s: each of the n pays s, those of faster types the rest. So

        T(n) >= max over s of sum over l of min over k of max(s(k), s) e(l, k) / D + ring(n)
    """
    able = np.isfinite(work_LK).all(axis=0)
    if not able.any():
        return 0.0
    # A type that lacks the memory for some layer is priced as the slowest that has it for all.
    known = np.where(np.isfinite(work_LK), work_LK, -np.inf)
    totals = np.where(able, work_LK.sum(axis=0, where=able), 0.0)
    speed_K = np.where(able, 1 / np.maximum(totals, 1e-300), 0.0)
    speed_K = np.where(able, speed_K, speed_K[able].min())
    most = int(number_K.sum())
    least = float("inf")
    ring_seconds = least_ring_seconds(costs)
    margins = []
    for margin in np.unique(speed_K):
        price_K = np.maximum(speed_K, margin)
        value = np.where(np.isfinite(known), price_K * known, np.inf).min(axis=1).sum()
        margins.append((float(value), float(number_K @ (price_K - margin)), float(margin)))
    number = 1
    while number <= most:
        up_to = min(most, max(number, int(number * GROWTH)))
        work = max(value / (fixed + up_to * margin) for value, fixed, margin in margins)
        least = min(least, work + ring_seconds(number))
        number = up_to + 1
    return least


def least_ring_seconds(costs: Costs) -> Callable[[int], float]:
    """Returns the least latency of a ring, as a function of its number of devices. Even a ring that
    fits in one node may be on several nodes, whose network may be quicker."""
    nodes, sites = costs.cluster.nodes, costs.cluster.sites
    direct = [each.link.latency for each in costs.cluster.direct]
    network = min(node.network.latency for node in nodes)
    between = min([network, *direct])
    islands = [node.islands.link.latency for node in nodes if node.islands]
    anywhere = min(between, *(node.inside.latency for node in nodes), *islands)
    widest = max(len(node.devices) for node in nodes)
    held = Counter(d.site for d in costs.devices.values())
    largest, across = max(held.values()), 0.0
    uplinks = sorted(s.uplink.latency if s.uplink else 0.0 for s in sites if held[s.name])
    if len(uplinks) > 1 and not direct:
        across = network + uplinks[1]  # the slower end of the quickest pair

    def seconds(number: int) -> float:
        if number < 2:
            return 0.0
        step = max(between if number > widest else anywhere, costs.step_latency)
        step = max(step, across) if number > largest else step
        return 2 * (number - 1) * step

    return seconds


def _after(costs: Costs, counts: Counter[str]) -> float:
    """Least seconds of the optimizer, and the overhead of a step."""
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
    """`at most 3.1 % above the best possible (1.2 s: all work ...)`; empty without a bound."""
    bound = prediction.lower_bound_seconds
    if not bound:
        return ""
    above = prediction.step_seconds / bound - 1
    if prediction.bound_reason == EXHAUSTIVE:
        return f"the best possible: {EXHAUSTIVE}"
    limit = format_seconds(bound)
    return f"at most {above:.1%} above the best possible ({limit}: {prediction.bound_reason})"

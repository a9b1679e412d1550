"""Bounds the step from below by the best path that a row may take through the layers.

Letters: L layers, C choices at a layer (`bound_choices`), K device types, w a price for a second on
a device of each type.

Every row takes a path: at each layer it is computed on some type of device, on some tensor width,
together with some number of rows, and its activations are kept or computed again. Three things are
true of the T seconds of any plan before its norm, for n(k) devices of each type in use:

* Chain. Each row is on its way through all layers, forward and back: T >= sum of chain seconds.
* Work. A step of T seconds sells at most T at prices w >= 0 with sum n(k) w(k) = 1 (linear
  programming duality), so T >= sum over all rows of w(k) * device-seconds.
* Memory. From the moment at which a row enters layer l until it is back, which is at least the sum
  of the chain seconds of l and all later layers, the devices hold what l keeps of it. With F bytes
  for activations on all devices together, F T >= sum over rows and layers of bytes * these seconds
  (the average content of a store is its rate of arrivals times their stay; Little, "A proof for the
  queuing formula L = lambda W", Operations Research 9(3), 1961).

Each of these is a mean over the B rows of a sum over a row's own path. So is any weighted mean of
the three with weights a, 1 - a - m and m, which therefore is no less than the best path's:

    T >= min over paths of sum over l of
             a c(l) + (1 - a - m) B w(k) e(l) + m B / F * s(l) * (c(l) + c(l + 1) + ... + c(L))

with the chain seconds c, device-seconds e and kept bytes s of the choice at each layer. The
weights and prices decide how tight a bound is, never whether it holds. Together the three see what
neither sees alone: many rows per micro-batch make the chain long and fill the memory, few make the
work slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.memory import memory_tables, usable_bytes
from meshwright.cost.weights import cast_bytes, stage_parameters, weight_bytes
from meshwright.search.bound_choices import ROUNDED, Choices
from meshwright.search.bound_gradients import LateSeconds
from meshwright.search.costs import Array, Costs
from meshwright.search.space import usable_devices
from meshwright.stopping import raise_if_stopped

CHAIN_WEIGHTS = (
    0.0,
    0.01,
    0.02,
    0.03,
    0.04,
    0.055,
    0.07,
    0.09,
    0.12,
    0.16,
    0.2,
    0.3,
    0.4,
    0.6,
    0.8,
)
"""Weights a that are tried, all below 1, until larger ones are worse."""
MEMORY_WEIGHTS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Weights m that are tried, until larger ones are worse."""
WORSE = 2
"""Number of worse weights in a row that ends the trials."""
MOMENTS = 40
"""Lengths of the rest of a path for which the cost of its beginning is tabled."""
PRICE_ROUNDS = 60
"""Subgradient steps that improve the prices for a weight."""
COSTS = ("chain", "work", "kept", "early")
"""What the paths of a row differ in."""
GROWTH = 1.02
"""Largest factor between numbers of devices that are bounded together."""


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """Holds the distinct layers of a model, U of them, as choices see them."""

    number: Array
    """How many layers [U] of each kind there are."""
    of_layer: NDArray[np.int64]
    """The kind [L] of each layer."""
    choices: Choices
    """Those of each kind, [U, C]."""


@dataclass(frozen=True, slots=True)
class WeightedBound:
    """Holds a weighted mean of bounds, and its value."""

    seconds: float
    chain: float
    """The weight a."""
    price: Array
    """The prices [K]."""


def layer_kinds(choices: Choices) -> LayerKinds:
    """Gathers layers whose choices are the same, and leaves out choices that another one of the
    same device type beats at every layer."""
    every = [getattr(choices, name) for name in COSTS]
    _, first, of_layer, number = np.unique(
        np.concatenate(every, axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    useful = np.zeros(len(choices.kind), dtype=bool)
    for k in np.unique(choices.kind):
        own = np.flatnonzero(choices.kind == k)
        for layer in first:
            useful[own[_unbeaten(*(each[layer, own] for each in every))]] = True
    some = {name: each[np.ix_(first, useful)] for name, each in zip(COSTS, every, strict=True)}
    picked = replace(choices, kind=choices.kind[useful], **some)
    return LayerKinds(number.astype(np.float64), of_layer.reshape(-1), picked)


def _unbeaten(*costs: Array) -> NDArray[np.int64]:
    """Returns the indices of the finite choices that no other one equals or beats in every cost."""
    left = np.flatnonzero(np.isfinite(np.sum(costs, axis=0)))
    left = left[np.lexsort([each[left] for each in reversed(costs)])]
    found: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        found.append(int(best))
        beaten = np.all([each[left] >= each[best] for each in costs], axis=0)
        left = left[~beaten]
    return np.array(found, dtype=np.int64)


def chain_seconds(kinds: LayerKinds) -> float:
    """Returns the seconds of the layers one after another, each where it is quickest."""
    choices = kinds.choices
    least = np.where(np.isfinite(choices.work), choices.chain, np.inf).min(axis=1, initial=np.inf)
    return float(kinds.number @ least)


def starting_prices(kinds: LayerKinds, number_K: Array) -> Array:
    """Returns prices [K] in proportion to the speed of each type, or to that of the slowest that
    can hold every layer where a type cannot."""
    work = np.full((len(kinds.number), len(number_K)), np.inf)
    for k in range(len(number_K)):
        own = kinds.choices.work[:, kinds.choices.kind == k]
        work[:, k] = own.min(axis=1, initial=np.inf)
    totals = kinds.number @ work
    speed = 1 / np.maximum(totals, 1e-300)
    able = np.isfinite(totals)
    slowest = speed[able].min() if able.any() else 1.0
    return np.where(able, speed, slowest)


def best_mixture(kinds: LayerKinds, number_K: Array, batch: int) -> WeightedBound:
    """Returns the best bound that chain and work together give for all devices."""
    price = starting_prices(kinds, number_K)
    best, worse = WeightedBound(0.0, 0.0, price), 0
    for weight in CHAIN_WEIGHTS:
        raise_if_stopped()
        found = _with_better_prices(kinds, number_K, batch, weight, price)
        price = found.price
        worse = worse + 1 if found.seconds <= best.seconds else 0
        best = max(best, found, key=lambda each: each.seconds)
        if worse == WORSE:
            break
    return best


def _with_better_prices(
    kinds: LayerKinds, number_K: Array, batch: int, weight: float, price_K: Array
) -> WeightedBound:
    """Improves prices by subgradient steps, which raise those of the types that layers crowd on."""
    choices, picked = kinds.choices, np.arange(len(kinds.number))
    best = WeightedBound(0.0, weight, price_K)
    for turn in range(PRICE_ROUNDS):
        price_K = price_K / (number_K @ price_K)
        cost = weight * choices.chain + (1 - weight) * batch * choices.work * price_K[choices.kind]
        chosen = cost.argmin(axis=1)
        value = float(kinds.number @ cost[picked, chosen])
        if value > best.seconds:
            best = WeightedBound(value, weight, price_K)
        busy = kinds.number * choices.work[picked, chosen]
        crowd = np.bincount(choices.kind[chosen], weights=busy, minlength=len(number_K)) / number_K
        if len(number_K) == 1 or not 0 < crowd.max() < np.inf:
            break
        price_K = price_K * np.exp(0.5 / (1 + turn) * (crowd / crowd.max() - 0.5))
    return best


def wide_seconds(
    kinds: LayerKinds,
    number_K: Array,
    batch: int,
    ring_seconds: Callable[[int], float],
    late: LateSeconds | None = None,
) -> float:
    """Returns the least seconds, over all numbers of devices, of chain and work on so many of them
    and of the norm's ring among them.

    n devices, at most N(k) of a type, sell no more than T at prices w(k) = max(s(k), s) / D with
    D = sum N(k) max(s(k) - s, 0) + n s: each of the n pays s, those of faster types the rest. So

        T(n) >= max over a, s of sum over l of min over choices of a c(l) + (1 - a) B w(k) e(l)
                + ring(n)

    `late` seconds in which few of them work add (1 - a) times what the others could have sold then.
    """
    speed_K = starting_prices(kinds, number_K)
    counts = _device_counts(int(number_K.sum()))
    least = np.zeros(len(counts))
    upper = np.array([last for _, last in counts], dtype=np.float64)
    choices = kinds.choices
    for margin in np.unique(speed_K):
        raise_if_stopped()
        price_K = np.maximum(speed_K, margin)
        sold = float(number_K @ (price_K - margin)) + upper * margin
        work = batch * choices.work * price_K[choices.kind]
        idle = np.array([late.idle(price_K, each) if late else 0.0 for each in sold])
        for weight in CHAIN_WEIGHTS:
            found = (1 - weight) * idle
            for number, chain, own in zip(kinds.number, choices.chain, work, strict=True):
                each = weight * chain + (1 - weight) * own / sold[:, None]
                found = found + number * each.min(axis=1, initial=np.inf)
            least = np.maximum(least, found)
    rings = [ring_seconds(first) for first, _ in counts]
    return float((least + rings).min())


def _device_counts(most: int) -> list[tuple[int, int]]:
    """Returns ranges of numbers of devices, first and last, whose work and ring are bounded
    together: the work by that of the last, the ring by that of the first."""
    found, number = [], 1
    while number <= most:
        last = min(most, max(number, int(number * GROWTH)))
        found.append((number, last))
        number = last + 1
    return found


def free_bytes(costs: Costs) -> float:
    """Returns the most bytes that all devices together have for activations.

    Beside these they hold each layer's weights, gradients and casts at least once, and its
    optimizer states once, however these are divided.
    """
    weights = memory_tables(costs.model, costs.job).plain.weights
    whole = (0, len(costs.model.layers))
    states = weights.unit.gradients + weights.unit.optimizer
    held = weight_bytes(weights, whole, 1) + cast_bytes(weights, whole, 1)
    held += stage_parameters(weights, whole, 1) * states
    room = sum(usable_bytes(costs.cluster.types[d.type]) + ROUNDED for d in usable_devices(costs))
    return float(room - held)


def memory_mixture_seconds(
    kinds: LayerKinds, best: WeightedBound, batch: int, free: float
) -> float:
    """Returns the best bound that chain, work and memory together give at the prices of `best`,
    with `free` bytes for activations; no better one than `best` if there are none."""
    work = batch * kinds.choices.work * best.price[kinds.choices.kind]
    useful = [
        _unbeaten(*each) for each in zip(kinds.choices.chain, work, kinds.choices.kept, strict=True)
    ]
    picked = [
        (kinds.choices.chain[u, some], work[u, some], kinds.choices.kept[u, some])
        for u, some in enumerate(useful)
    ]
    seconds, worse = best.seconds, 0
    for memory in MEMORY_WEIGHTS if free > 0 else ():
        found = 0.0
        for chain in (best.chain * (1 - memory), best.chain / 2, 0.0):
            raise_if_stopped()
            rate = memory * batch / free
            costs = [(c, chain * c + (1 - chain - memory) * w, rate * s) for c, w, s in picked]
            found = max(found, least_path(kinds.of_layer, costs, 2 * best.seconds))
        worse = worse + 1 if found <= seconds else 0
        seconds = max(seconds, found)
        if worse == WORSE:
            break
    return seconds


def least_path(
    of_layer: NDArray[np.int64], costs: list[tuple[Array, Array, Array]], longest: float
) -> float:
    """Returns the least sum over layers of a choice's own cost, and of its rate times the chain
    seconds of this and all later layers.

    V(l, r), the least cost of the layers up to l if those after it take r seconds of the chain,
    follows from V(l - 1, .). As a least of lines in r it is concave and never falls: between tabled
    moments it lies above the straight line, and past the last one above its value there. So the
    sum that is returned is no larger than the true one.
    """
    moments = longest * (np.arange(MOMENTS) / (MOMENTS - 1)) ** 2
    table = np.zeros(MOMENTS)
    for u in of_layer:
        chain, own, rate = costs[u]
        rest = moments[:, None] + chain
        before = np.interp(rest.ravel(), moments, table).reshape(rest.shape)
        table = (own + rate * rest + before).min(axis=1)
    return float(table[0])

"""Lines from pools of like units: which pools stand in a line, in which order, how deep and wide.

A pool is all units of one type on nodes of one kind at one site: they are interchangeable. Letters:
S stages, M micro-batches.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import prod

from meshwright.search.costs import Costs
from meshwright.search.fitting import Fitted, Stages, fit_line, pace
from meshwright.search.lines import Unit
from meshwright.search.space import divisors, usable_devices

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of stages that a pool may be cut into."""

DEPTH_VECTORS = 192
"""Up to so many ways to give every pool of a block its depth, all are tried."""

LINES = (24, 192)
"""Lines of one block of pools that are fitted, the most promising first: at least and at most; in
between so many that their devices are FITTED_DEVICES. Four times as many may fail to fit."""

FITTED_DEVICES = 8_000

ROW_COUNTS = 6
"""Micro-batch sizes tried with every shape."""

KEPT = 3
"""Lines of one block that go into the mix."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable units."""

    units: tuple[Unit, ...]
    """Node by node."""
    pace: float
    """Seconds per row of the whole model on one of them."""
    site: str

    @property
    def speed(self) -> float:
        """Rows per second of all of them, without any loss."""
        return len(self.units) / self.pace


def pools(costs: Costs, tensor: int) -> tuple[Pool, ...]:
    """The units of `tensor` devices that the cluster offers; fastest first."""
    nodes = {node.name: node for node in costs.cluster.nodes}
    by_class: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        by_class.setdefault((device.node, device.type), []).append(device.name)
    found: dict[object, list[Unit]] = {}
    for (name, kind), devices in by_class.items():
        node = nodes[name]
        units = [tuple(devices[i : i + tensor]) for i in range(0, len(devices), tensor)]
        whole = [unit for unit in units if len(unit) == tensor]
        key = (kind, node.site, node.inside, node.network, len(node.devices))
        found.setdefault(key, []).extend(whole)
    every = [
        Pool(tuple(units), pace(costs, units[0]), nodes[costs.devices[units[0][0]].node].site)
        for units in found.values()
        if units
    ]
    return tuple(sorted(every, key=lambda pool: pool.pace))


def offers(
    costs: Costs, block: tuple[Pool, ...], share: float, *, alone: bool
) -> tuple[Fitted, ...]:
    """The best lines of a block of pools for about `share` rows of the batch, best first.

    `alone`: the share is the whole batch, and must be met.
    """
    most = 4 * KEPT if alone else KEPT
    found: list[tuple[float, int, Fitted]] = []
    size = sum(len(pool.units) * len(pool.units[0]) for pool in block)
    enough = min(LINES[1], max(LINES[0], FITTED_DEVICES // size))
    scored = _promising(costs, block, share, alone=alone)
    for number, (bound, shape, rows) in enumerate(scored[: 4 * enough]):
        if (len(found) >= 2 * most and bound >= found[2 * most - 1][0]) or len(found) == enough:
            break
        fitted = fit_line(costs, _written(shape), rows, max(1, round(share / rows)), "1f1b")
        if fitted is not None:
            seconds = fitted.once + (share / rows - 1) * fitted.slowest
            insort(found, (seconds, number, fitted), key=lambda entry: entry[:2])
    kept: list[Fitted] = []
    for _, _, fitted in found:
        if sum(_stages(k) == _stages(fitted) for k in kept) < 2:
            kept.append(fitted)
    return tuple(kept[:most])


def _stages(fitted: Fitted) -> Stages:
    return tuple(team.units for team in fitted.line.teams)


def _row_counts(widest: int, share: float, *, alone: bool) -> list[int]:
    """Rows of a micro-batch: a few for every replica of the widest stage."""
    if alone:
        every = [rows for rows in divisors(round(share)) if rows >= widest]
        step = max(1, -(-len(every) // ROW_COUNTS))
        return every[::step]
    full = max(1, round(share / widest)) * widest
    every = sorted({*(widest << i for i in range(ROW_COUNTS - 2)), full, max(widest, round(share))})
    return [rows for rows in every if rows <= max(widest, share)]


@dataclass(frozen=True, slots=True)
class _Shape:
    """A block of pools as stages, before they are written down device by device."""

    pools: tuple[Pool, ...]
    depths: tuple[int, ...]
    """Stages of each pool, all of equal width; one number: all pools mixed in every stage."""
    across: bool
    """Neighbouring units stand in neighbouring stages, not beside each other as replicas."""

    @property
    def mixed(self) -> bool:
        return len(self.depths) < len(self.pools)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units in a stage of each pool."""
        if self.mixed:
            return (sum(len(pool.units) for pool in self.pools) // self.depths[0],)
        return tuple(len(p.units) // d for p, d in zip(self.pools, self.depths, strict=True))


def _promising(
    costs: Costs, block: tuple[Pool, ...], share: float, *, alone: bool
) -> list[tuple[float, _Shape, int]]:
    """Shapes of a block with rows of a micro-batch, by the least time that they could take."""
    scored = [
        (_optimistic(costs, shape, rows, share), shape, rows)
        for shape in _shapes(block, len(costs.model.layers))
        for rows in _row_counts(max(shape.widths), share, alone=alone)
    ]
    scored.sort(key=lambda entry: entry[0])
    return scored


def _optimistic(costs: Costs, shape: _Shape, rows: int, share: float) -> float:
    """Perfectly balanced, without links, the first micro-batch on the fastest stage alone."""
    if shape.mixed:
        each = max(1, rows // shape.widths[0])
        total = sum(len(pool.units) / pace(costs, pool.units[0], each) for pool in shape.pools)
        return share / total
    speeds = [
        width / pace(costs, pool.units[0], max(1, rows // width))
        for pool, width in zip(shape.pools, shape.widths, strict=True)
    ]
    total = sum(s * depth for s, depth in zip(speeds, shape.depths, strict=True))
    return (share - rows) / total + rows / max(speeds)


def _shapes(block: tuple[Pool, ...], most: int) -> Iterator[_Shape]:
    """Every pool a run of stages, in every order; and all pools mixed in every stage."""
    orders = list(permutations(block)) if len(block) <= 3 else [block, block[::-1]]
    for order in orders:
        for depths in _depths(order, most):
            yield _Shape(order, depths, across=False)
            wide = (d > 1 and len(p.units) // d > 1 for p, d in zip(order, depths, strict=True))
            if any(wide):
                yield _Shape(order, depths, across=True)
    if len(block) > 1:
        number = sum(len(pool.units) for pool in block)
        for depth in (d for d in DEPTHS if d <= min(most, number)):
            yield _Shape(block, (depth,), across=True)


def _depths(order: Sequence[Pool], most: int) -> Iterator[tuple[int, ...]]:
    """How many stages each pool becomes: all ways if they are few, else equal widths or one."""
    options = [[d for d in DEPTHS if d <= len(pool.units)] for pool in order]
    if prod(map(len, options)) <= DEPTH_VECTORS:
        found = set(product(*options))
    else:
        widths = {len(p.units) // d for p, each in zip(order, options, strict=True) for d in each}
        found = {
            tuple(len(pool.units) // min(width, len(pool.units)) for pool in order)
            for width in widths
        }
        found.add((1,) * len(order))
    yield from (depths for depths in sorted(found) if sum(depths) <= most)


def _written(shape: _Shape) -> Stages:
    """The units of every stage."""
    if shape.mixed:
        units = tuple(unit for pool in shape.pools for unit in pool.units)
        depth, width = shape.depths[0], shape.widths[0]
        return tuple(units[s::depth][:width] for s in range(depth))
    found: list[tuple[Unit, ...]] = []
    for pool, depth, width in zip(shape.pools, shape.depths, shape.widths, strict=True):
        for s in range(depth):
            if shape.across:
                found.append(pool.units[s : s + width * depth : depth])
            else:
                found.append(pool.units[s * width : (s + 1) * width])
    return tuple(found)

"""Lines from pools of like units: which pools stand in a line, in which order, how deep and wide.

A pool is all units of one type on nodes of one kind at one site: they are interchangeable. Letters:
S stages, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from meshwright.search.costs import Costs
from meshwright.search.fitting import Fitted, Stages, fit_line, pace
from meshwright.search.lines import Unit
from meshwright.search.space import divisors, usable_devices

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of stages that a pool may be cut into."""

SHAPES = 48
"""Shapes of one block of pools that are looked at, the most promising first."""

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
    found: list[tuple[float, int, Fitted]] = []
    for number, stages in enumerate(_promising(costs, block, share)):
        for rows in _row_counts(stages, share, alone=alone):
            count = max(1, round(share / rows))
            fitted = fit_line(costs, stages, rows, count, "1f1b")
            if fitted is not None:
                seconds = fitted.once + (share / rows - 1) * fitted.slowest
                found.append((seconds, number, fitted))
    found.sort(key=lambda entry: entry[:2])
    kept: list[Fitted] = []
    for _, _, fitted in found:
        same = [k for k in kept if _stages(k) == _stages(fitted)]
        if len(same) < 2:
            kept.append(fitted)
    return tuple(kept[: 4 * KEPT if alone else KEPT])


def _stages(fitted: Fitted) -> Stages:
    return tuple(team.units for team in fitted.line.teams)


def _row_counts(stages: Stages, share: float, *, alone: bool) -> list[int]:
    """Rows of a micro-batch: a few for every replica of the widest stage."""
    widest = max(len(units) for units in stages)
    if alone:
        every = [rows for rows in divisors(round(share)) if rows >= widest]
        step = max(1, -(-len(every) // ROW_COUNTS))
        return every[::step]
    every = sorted({*(widest << i for i in range(ROW_COUNTS - 1)), max(widest, round(share))})
    return [rows for rows in every if rows <= max(widest, share)]


def _promising(costs: Costs, block: tuple[Pool, ...], share: float) -> list[Stages]:
    """The shapes of a block whose optimistic time is least: perfectly balanced, without links."""
    scored = []
    seen = set()
    for number, stages in enumerate(_shapes(costs, block)):
        if stages not in seen:
            seen.add(stages)
            scored.append((_optimistic(costs, stages, share), number, stages))
    scored.sort(key=lambda entry: entry[:2])
    return [stages for _, _, stages in scored[:SHAPES]]


def _optimistic(costs: Costs, stages: Stages, share: float) -> float:
    speed = sum(sum(1 / pace(costs, unit) for unit in units) for units in stages)
    rows = max(len(units) for units in stages)
    return share / speed + (len(stages) - 1) * rows / speed


def _shapes(costs: Costs, block: tuple[Pool, ...]) -> Iterator[Stages]:
    """Every pool a run of stages, in every order; and all pools mixed in every stage."""
    most = len(costs.model.layers)
    orders = list(permutations(block)) if len(block) <= 3 else [block, block[::-1]]
    for order in orders:
        for depths in _depths(order, most):
            for across in (False, True):
                yield tuple(
                    stage
                    for pool, depth in zip(order, depths, strict=True)
                    for stage in _cut(pool.units, depth, across=across)
                )
    if len(block) > 1:
        units = tuple(unit for pool in block for unit in pool.units)
        for depth in (d for d in DEPTHS if d <= min(most, len(units))):
            yield tuple(units[s::depth][: len(units) // depth] for s in range(depth))


def _depths(order: Sequence[Pool], most: int) -> Iterator[tuple[int, ...]]:
    """How many stages each pool becomes: all ways if they are few, else equal widths or one."""
    options = [[d for d in DEPTHS if d <= len(pool.units)] for pool in order]
    number = 1
    for each in options:
        number *= len(each)
    if number <= 4 * SHAPES:
        found = set(product(*options))
    else:
        widths = sorted(
            {len(pool.units) // d for pool in order for d in DEPTHS if d <= len(pool.units)}
        )
        found = {
            tuple(max(1, len(pool.units) // min(width, len(pool.units))) for pool in order)
            for width in widths
        }
        found.add((1,) * len(order))
    yield from (depths for depths in sorted(found) if sum(depths) <= most)


def _cut(units: tuple[Unit, ...], depth: int, *, across: bool) -> Stages:
    """A pool as stages of equal width: neighbours are replicas, or (`across`) stages of one."""
    width = len(units) // depth
    if across:
        return tuple(tuple(units[r * depth + s] for r in range(width)) for s in range(depth))
    return tuple(units[s * width : (s + 1) * width] for s in range(depth))

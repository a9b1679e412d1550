"""Builds pipelines from pools of interchangeable devices: which pools, in which order, how deep and
how wide.

A pool is all devices of one type on nodes of one kind at one site, cut into tensor groups: they are
interchangeable. Letters: S stages, M micro-batches, P parameters of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import prod

import numpy as np

from meshwright.model.spec import num_parameters
from meshwright.plan.ranks import gradient_bytes
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, TensorGroup, ring, seconds_per_byte
from meshwright.search.layer_partition import Stages, fit_pipeline, pace
from meshwright.search.space import divisors, legal_widths, tensor_groups, usable_devices

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of stages that a pool may be cut into."""

COMBINED = 60_000
"""Ways to give every pool of a block its tensor width and depth that are priced at once; where
there are more, all pools get equal widths."""

PROMISING = 48
"""Ways to cut a block, for each size of micro-batch, that are kept."""

FEW_POOLS = 4
"""Pools up to which one pipeline is made of every set of them."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable tensor groups."""

    groups: tuple[TensorGroup, ...]
    """Node by node."""
    pace: float
    """Seconds per row of the whole model on one of them."""
    site: str

    @property
    def speed(self) -> float:
        """Rows per second of all of them, without any loss."""
        return len(self.groups) / self.pace

    @property
    def tensor(self) -> int:
        """Devices of a tensor group."""
        return len(self.groups[0])


Widths = dict[int, Pool]
"""One pool, by tensor width."""


def pools(costs: Costs, tensor: int) -> tuple[Pool, ...]:
    """The tensor groups of `tensor` devices that the cluster offers; fastest first."""
    every = (widths[tensor] for widths in pool_table(costs, (tensor,)) if tensor in widths)
    return tuple(sorted(every, key=lambda pool: pool.pace))


def pool_table(costs: Costs, tensors: Sequence[int]) -> tuple[Widths, ...]:
    """The pools of a cluster in the order of their devices, at these tensor widths."""
    nodes = {node.name: node for node in costs.cluster.nodes}
    by_class: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs):
        by_class.setdefault((device.node, device.type), []).append(device.name)
    found: dict[object, list[list[str]]] = {}
    for (name, kind), devices in by_class.items():
        node = nodes[name]
        key = (kind, node.site, node.inside, node.islands, node.network, len(node.devices))
        found.setdefault(key, []).append(devices)
    table = []
    for by_node in found.values():
        site = nodes[costs.devices[by_node[0][0]].node].site
        widths: Widths = {}
        for tensor in tensors:
            groups = tuple(
                group for devices in by_node for group in tensor_groups(costs, devices, tensor)
            )
            if groups:
                widths[tensor] = Pool(groups, pace(costs, groups[0]), site)
        if widths:
            table.append(widths)
    return tuple(table)


@dataclass(frozen=True, slots=True)
class PoolStages:
    """A block of pools as stages, before they are written down device by device."""

    pools: tuple[Pool, ...]
    depths: tuple[int, ...]
    """Stages of each pool, all of equal width; one number: all pools mixed in every stage."""

    @property
    def mixed(self) -> bool:
        """True if every stage has tensor groups of every pool."""
        return len(self.depths) < len(self.pools)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tensor groups in a stage of each pool."""
        if self.mixed:
            return (sum(len(pool.groups) for pool in self.pools) // self.depths[0],)
        return tuple(len(p.groups) // d for p, d in zip(self.pools, self.depths, strict=True))


@dataclass(frozen=True, slots=True)
class Draft:
    """A shape with its micro-batches."""

    guess: float
    """Seconds of a balanced pipeline: no cut costs anything, layers can be divided."""
    shape: PoolStages
    rows: int

    @property
    def build(self) -> tuple[Pool, ...]:
        """What tells it from drafts that differ in depth alone."""
        return self.shape.pools


def drafts(
    costs: Costs, block: Sequence[Widths], share: float, row_counts: Sequence[int]
) -> list[Draft]:
    """The most promising ways to cut a block for a share of the batch; best guess first."""
    found: list[Draft] = []
    layers = len(costs.model.layers)
    for options in _choices(block, layers):
        for rows in row_counts:
            found += _separate(costs, options, share, rows)
    for tensor in sorted(set.intersection(*map(set, block))) if len(block) > 1 else ():
        together = tuple(widths[tensor] for widths in block)
        number = sum(len(pool.groups) for pool in together)
        for depth in (d for d in DEPTHS if d <= min(layers, number)):
            shape = PoolStages(together, (depth,))
            found += (
                Draft(_mixed_guess(costs, shape, rows, share), shape, rows)
                for rows in row_counts
                if rows >= shape.widths[0]
            )
    return sorted(found, key=lambda draft: draft.guess)


Option = tuple[Pool, int]
"""A pool at some tensor width, and its number of stages."""


def _choices(block: Sequence[Widths], layers: int) -> Iterator[list[list[Option]]]:
    """For every pool of a block the options that are combined with all options of the others."""
    every = [
        [
            (pool, d)
            for pool in widths.values()
            for d in DEPTHS
            if d <= min(len(pool.groups), layers)
        ]
        for widths in block
    ]
    if prod(map(len, every)) <= COMBINED:
        yield every
        return
    for tensor in sorted({tensor for widths in block for tensor in widths}):
        nearest = [
            widths[max((t for t in widths if t <= tensor), default=min(widths))] for widths in block
        ]
        for width in sorted(
            {len(pool.groups) // d for pool in nearest for d in DEPTHS if d <= len(pool.groups)}
        ):
            yield [[(pool, max(1, len(pool.groups) // width))] for pool in nearest]


def _separate(
    costs: Costs, options: Sequence[list[Option]], share: float, rows: int
) -> Iterator[Draft]:
    """Every pool in stages of its own:

    (M - 1 + S) * rows / speed of all + the slowest pool's gradient reduction
    """
    usable = [[o for o in own if len(o[0].groups) // o[1] <= rows] for own in options]
    if not all(usable):
        return
    axes = len(usable)
    speed, depth, slope = np.zeros(1), np.zeros(1), np.zeros(1)
    for axis, own in enumerate(usable):
        turned = [1] * axes
        turned[axis] = len(own)
        facts = np.array([_facts(costs, pool, stages, rows) for pool, stages in own])
        speed = speed + facts[:, 0].reshape(turned)
        depth = depth + facts[:, 1].reshape(turned)
        slope = np.maximum(slope, (facts[:, 2] * facts[:, 0]).reshape(turned))
    size = num_parameters(costs.model) * gradient_bytes(costs.job)
    guess = (share - rows + depth * rows) / speed + size * slope / speed
    guess = np.where(depth <= len(costs.model.layers), guess, np.inf).reshape(-1)
    shape = tuple(map(len, usable))
    most = min(PROMISING, len(guess))
    for index in np.argsort(guess, kind="stable")[:most]:
        if np.isfinite(guess[index]):
            chosen = [own[i] for own, i in zip(usable, np.unravel_index(index, shape), strict=True)]
            stages = PoolStages(tuple(pool for pool, _ in chosen), tuple(d for _, d in chosen))
            yield Draft(float(guess[index]), stages, rows)


def _facts(costs: Costs, pool: Pool, depth: int, rows: int) -> tuple[float, float, float]:
    """Rows per second, stages, and seconds of reduction for each byte of the pool's share."""
    width = len(pool.groups) // depth
    speed = depth * width / pace(costs, pool.groups[0], -(-rows // width))
    if width == 1:
        return speed, depth, 0.0
    members = tuple(group[0] for group in pool.groups[:width])
    _, slope = seconds_per_byte(costs, [ring(costs, members)])
    return speed, depth, slope / depth / pool.tensor


def _mixed_guess(costs: Costs, shape: PoolStages, rows: int, share: float) -> float:
    each = max(1, rows // shape.widths[0])
    speed = sum(len(pool.groups) / pace(costs, pool.groups[0], each) for pool in shape.pools)
    return (share - rows + rows * shape.depths[0]) / speed


def by_build(found: Sequence[Draft]) -> list[Draft]:
    """The best of every build, then the second of each: what the links between pools cost is not
    in the guess."""
    turns: Counter[object] = Counter()
    placed = []
    for number, draft in enumerate(found):
        placed.append((turns[draft.build], draft.guess, number, draft))
        turns[draft.build] += 1
    return [entry[3] for entry in sorted(placed, key=lambda entry: entry[:3])]


def orders(shape: PoolStages) -> Iterator[PoolStages]:
    """Its pools in every order; of many, as they are and the other way round."""
    count = len(shape.pools)
    if shape.mixed or count == 1:
        yield shape
        return
    ways = permutations(range(count)) if count <= 3 else (range(count), range(count)[::-1])
    for way in ways:
        yield PoolStages(tuple(shape.pools[i] for i in way), tuple(shape.depths[i] for i in way))


def written(shape: PoolStages, *, across: bool) -> Stages:
    """The tensor groups of every stage. `across`: neighbouring tensor groups stand in neighbouring
    stages, not beside each other as replicas."""
    if shape.mixed:
        groups = tuple(group for pool in shape.pools for group in pool.groups)
        depth, width = shape.depths[0], shape.widths[0]
        return tuple(groups[s::depth][:width] for s in range(depth))
    found: list[tuple[TensorGroup, ...]] = []
    for pool, depth, width in zip(shape.pools, shape.depths, shape.widths, strict=True):
        for s in range(depth):
            if across:
                found.append(pool.groups[s : s + width * depth : depth])
            else:
                found.append(pool.groups[s * width : (s + 1) * width])
    return tuple(found)


def two_ways(shape: PoolStages) -> bool:
    """True if `across` makes a difference."""
    pairs = zip(shape.widths, shape.depths, strict=True)
    return not shape.mixed and any(width > 1 and depth > 1 for width, depth in pairs)


def whole_batch(costs: Costs) -> tuple[int, ...]:
    """Rows of a micro-batch that a single pipeline may have."""
    every = divisors(costs.job.global_batch)
    step = -(-len(every) // 12)
    return every[::step]


def single_pipelines(
    costs: Costs, limit: Callable[[], float]
) -> Iterator[tuple[CandidatePipeline, ...]]:
    """Pipelines of whole pools for all of the batch, the most promising first, over all tensor
    widths of every pool; those whose guess is above the limit are left out."""
    table = pool_table(costs, legal_widths(costs))
    row_counts = whole_batch(costs)
    found = []
    for block in blocks(table):
        found += drafts(costs, block, costs.job.global_batch, row_counts)
    found.sort(key=lambda draft: draft.guess)
    for draft in by_build(found):
        if draft.guess >= limit():
            continue
        for shape in orders(draft.shape):
            for across in (False, True) if two_ways(shape) else (False,):
                stages = written(shape, across=across)
                fitted = fit_pipeline(
                    costs, stages, draft.rows, costs.job.global_batch // draft.rows, "1f1b"
                )
                yield (fitted.pipeline,) if fitted else ()


def blocks(table: Sequence[Widths]) -> Iterator[tuple[Widths, ...]]:
    """Yields the sets of pools that one pipeline may use; of many pools, only a few sets."""
    if len(table) <= FEW_POOLS:
        for number in range(len(table), 0, -1):
            yield from combinations(table, number)
        return
    first = [min(widths.values(), key=lambda pool: pool.pace) for widths in table]
    ordered = [table[i] for i in sorted(range(len(table)), key=lambda i: first[i].pace)]
    sites = dict.fromkeys(pool.site for pool in first)
    found = [tuple(ordered[:number]) for number in range(len(table), 0, -1)]
    found += [
        tuple(w for w, pool in zip(table, first, strict=True) if pool.site == site)
        for site in sites
    ]
    found += [(widths,) for widths in table]
    seen: list[tuple[Widths, ...]] = []
    for block in found:
        if block not in seen:
            seen.append(block)
            yield block

"""HARP's space: stages of one type, whose micro-batches launched ahead are chosen with the cut.

"HARP: Orchestrating Automated Parallel Training on Heterogeneous GPU Clusters", EuroSys 2026 (arXiv
2509.24859). A subcluster is all devices of one type at one site. Each subcluster in use holds one
or several equal stages with a data and a tensor width of their own; subclusters stand in any order.
A stage launches as many micro-batches ahead as hide the link behind it: the layers are cut for
eager 1F1B, and the best cuts are then moved layer by layer in the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, permutations, product
from math import prod

from rival_searches import Block, Draft, Found, drafted, play, ring_slope, search
from rival_zones import zones

from meshwright.plan.spec import Plan, ScheduleName
from meshwright.search.candidate import (
    CandidatePipeline,
    candidate_of,
    fits,
    plan_of,
    tensor_widths_agree,
)
from meshwright.search.costs import Costs, TensorGroup
from meshwright.search.layer_partition import Stages
from meshwright.search.space import divisors, legal_widths

ORDERS: tuple[ScheduleName, ...] = ("eager-1f1b", "1f1b")
"""As many micro-batches ahead as hide the transfers, or no more than a pipeline needs."""

SHAPES = 6_000
"""Ways to divide the subclusters of one order into stages, at most: beyond that only depths that
are powers of two, and then only the first ones."""

MOVED = 24_000
"""Ranks x micro-batches that may be simulated while cuts are moved."""

Meshes = tuple[tuple[TensorGroup, ...], int]
"""Units of a subcluster, and the stages that they are divided into."""


def harp(costs: Costs) -> Found | None:
    """The best plan of HARP's space; None if nothing in it fits."""
    own = subclusters(costs)
    drafts: list[Draft] = []
    for number in range(1, len(own) + 1):
        for order in permutations(own, number):
            for shape in _shapes(costs, [own[zone] for zone in order]):
                drafts += _drafts(costs, shape)
    found = search(costs, drafts, ORDERS)
    return found and _moved(costs, found)


def subclusters(costs: Costs) -> dict[tuple[str, str], list[tuple[TensorGroup, ...]]]:
    """By type and site the tensor groups of each tensor width."""
    found: dict[tuple[str, str], list[tuple[TensorGroup, ...]]] = {}
    for tensor in legal_widths(costs):
        for zone, units in sorted(zones(costs, tensor).items()):
            found.setdefault(zone, []).append(units)
    return found


def _shapes(
    costs: Costs, zones: Sequence[Sequence[tuple[TensorGroup, ...]]]
) -> Iterator[tuple[Meshes, ...]]:
    """Every way to divide these subclusters into equal stages, within the allowance."""
    layers = len(costs.model.layers)
    options = [
        [(units, depth) for units in zone for depth in range(1, min(len(units), layers) + 1)]
        for zone in zones
    ]
    if prod(map(len, options)) > SHAPES:
        options = [[each for each in own if each[1] & (each[1] - 1) == 0] for own in options]
    every = (shape for shape in product(*options) if sum(d for _, d in shape) <= layers)
    return islice(every, SHAPES)


def _drafts(costs: Costs, shape: tuple[Meshes, ...]) -> Iterator[Draft]:
    """Every micro-batch size on these stages; devices that do not fill a stage are left out."""
    widths = [len(units) // depth for units, depth in shape]
    slopes = [
        ring_slope(costs, units[:width]) for (units, _), width in zip(shape, widths, strict=True)
    ]
    stages = partial(_written, shape)
    for rows in divisors(costs.job.global_batch):
        if all(rows % width == 0 for width in widths):
            blocks = [
                Block(units[0], rows // width, depth, slope)
                for (units, depth), width, slope in zip(shape, widths, slopes, strict=True)
            ]
            yield drafted(costs, blocks, rows, stages, by_speed=False)


def _written(shape: tuple[Meshes, ...]) -> Stages:
    found = []
    for units, depth in shape:
        width = len(units) // depth
        found += [units[s * width : (s + 1) * width] for s in range(depth)]
    return tuple(found)


def _moved(costs: Costs, found: Found) -> Found:
    """The plan with single layers moved over its cuts for as long as that helps."""
    best, work = found, MOVED
    moved = True
    while moved and work > 0:
        moved = False
        line = candidate_of(best.plan.pipelines[0])
        for other in _neighbours(line):
            if not _is_legal(costs, other, best.plan):
                continue
            seconds, spent = play(costs, other, best.plan.schedule)
            work -= spent
            if seconds < best.seconds * (1 - 1e-9):
                plan = plan_of(costs, (other,), best.plan.schedule)
                best, moved = replace(best, plan=plan, seconds=seconds), True
                break
            if work <= 0:
                break
    return best


def _neighbours(line: CandidatePipeline) -> Iterator[CandidatePipeline]:
    for cut, by in product(range(1, len(line.bounds) - 1), (-1, 1)):
        bounds = [*line.bounds]
        bounds[cut] += by
        if bounds[cut - 1] < bounds[cut] < bounds[cut + 1]:
            yield replace(line, bounds=tuple(bounds))


def _is_legal(costs: Costs, line: CandidatePipeline, plan: Plan) -> bool:
    return tensor_widths_agree(costs, (line,)) and fits(costs, line, plan.schedule)

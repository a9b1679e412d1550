"""Two restricted searches in the manner of published planners, under Meshwright's own costs.

Both look for one pipeline, try every micro-batch size with 1f1b and with gpipe, and cut the layers
with Meshwright's exact assignment under its memory model, ranked by Meshwright's simulator. What is
theirs is the space:

metis   "Metis: Fast Automatic Distributed Training on Heterogeneous GPUs", ATC 2024. Device types
        in every order; the devices so ordered, all of them, are cut into groups of powers of two,
        none smaller than half the average (or into equal groups); every group is a stage with its
        own data and tensor width. A stage of several types shares out its rows by speed.
sailor  "Sailor: Automating Distributed Training over Dynamic, Heterogeneous, and Geo-distributed
        Clusters", SOSP 2025. One tensor width for each type, one data width for all stages, equal
        rows; stages of one type in one zone each, or runs of devices across types and zones; any
        devices may be left out.

Letters: S stages, L layers, M micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, permutations, product
from math import prod

import numpy as np

from meshwright.plan.spec import Plan, ScheduleName
from meshwright.program.buckets import gradient_bytes
from meshwright.search.compose import DEPTHS, pools
from meshwright.search.contest import work_of
from meshwright.search.costs import (
    Costs,
    distinct_units,
    ring,
    seconds_per_byte,
    unit_kind,
    unit_times,
)
from meshwright.search.fitting import Stages, apportion, pace, recut
from meshwright.search.lines import Line, Team, Unit, plan_of, tensor_widths_agree
from meshwright.search.lower import after_lines, line_bound
from meshwright.search.mix import legal_widths
from meshwright.search.partition import Array
from meshwright.search.space import divisors, usable_devices
from meshwright.simulate.fold import fold, simulate_folded

FITTED = 900
"""Drafts whose layers are cut, at most; the most promising first."""

AT_ONCE = 300
"""Drafts that are cut before the best of them are simulated."""

BOTH = 6
"""Best lines that are tried with gpipe as well."""

WORK = 48_000
"""Ranks x micro-batches that may be simulated for one search."""

SMALLEST_GROUP = 0.5
"""Of the average: Metis leaves out smaller groups. Its authors' default."""

PERMUTED = 4
"""Runs of equal groups that Metis puts in every order; longer sequences are merged to so many."""

GROUPED = 4_000
"""Ways to group the devices of Metis that are priced, at most: equal groups first, then those with
the fewest stages across types."""

DEPTH_VECTORS = 400
"""Up to so many ways to give every zone of Sailor its number of stages, all are tried; else only
those of DEPTHS and the deepest."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A strategy before its layers are cut."""

    bound: float
    """Seconds that it takes at least."""
    guess: float
    """The same with its gradient reductions estimated: the order in which drafts are looked at."""
    stages: Callable[[], Stages]
    rows: int
    """Of a micro-batch, over all replicas of a stage."""
    micro_batches: int
    by_speed: bool
    """Whether replicas of several types share out the rows by speed; else equally."""
    build: tuple[tuple[str, str, int], ...]
    """Types, sites and tensor widths in the order in which they stand."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of a restricted space."""

    plan: Plan
    seconds: float
    """In the simulator."""
    drafts: int
    fitted: int
    """Drafts whose layers were cut."""
    complete: bool
    """Whether no draft that could be faster was left over."""


def search(costs: Costs, drafts: Sequence[Draft]) -> Found | None:
    """The draft that is fastest in the simulator; None if none fits.

    Lines are looked for as 1f1b; the best of them are tried as gpipe, too.
    """
    played: list[tuple[float, Line]] = []
    ordered = _by_build(drafts)
    fitted, work, best, skipped = 0, WORK, float("inf"), False
    while fitted < FITTED and work > 0:
        limit = best
        some = list(islice((d for d in ordered if d.bound < limit), AT_ONCE))
        if not some:
            break
        fitted += len(some)
        for bound, line in _by_turns(_cut(costs, some)):
            if bound < best and work > 0:
                seconds, spent = _played(costs, line, "1f1b")
                work -= spent
                best = min(best, seconds)
                played.append((seconds, line))
            skipped = skipped or (bound < best and work <= 0)
    if not played:
        return None
    found = _either_schedule(costs, sorted(played, key=lambda entry: entry[0])[:BOTH])
    left = skipped or any(draft.bound < found[0] for draft in ordered)
    return Found(found[1], found[0], len(drafts), fitted, not left)


def _played(costs: Costs, line: Line, schedule: ScheduleName) -> tuple[float, int]:
    """Seconds in the simulator, and its work."""
    plan = plan_of(costs, (line,), schedule)
    timeline = simulate_folded(plan, costs.model, costs.cluster, costs.profile)
    return timeline.step_seconds, work_of(plan, fold(plan, costs.cluster))


def _either_schedule(costs: Costs, lines: Sequence[tuple[float, Line]]) -> tuple[float, Plan]:
    """The best of these 1f1b lines, and of the same devices and rows as gpipe."""
    best = lines[0][0], plan_of(costs, (lines[0][1],), "1f1b")
    for _, line in lines:
        fitted = recut(costs, line.teams, line.micro_batches, "gpipe")
        if fitted is not None and tensor_widths_agree(costs, (fitted.line,)):
            seconds, _ = _played(costs, fitted.line, "gpipe")
            if seconds < best[0]:
                best = seconds, plan_of(costs, (fitted.line,), "gpipe")
    return best


Cut = tuple[float, Line]
"""A line that fits, behind the seconds that it takes at least."""


def _cut(costs: Costs, drafts: Sequence[Draft]) -> Iterator[Cut]:
    for draft in drafts:
        teams = tuple(Team(units, _shares(costs, draft, units)) for units in draft.stages())
        fitted = recut(costs, teams, draft.micro_batches, "1f1b")
        if fitted is not None and tensor_widths_agree(costs, (fitted.line,)):
            line = fitted.line
            yield line_bound(costs, line, "1f1b") + after_lines(costs, (line,)), line


def _by_turns(cuts: Iterable[Cut]) -> list[Cut]:
    """The best of every build (widths and rows), then the second best of each: neighbours by their
    bound are neighbours in the simulator."""
    turns: Counter[object] = Counter()
    placed = []
    for cut in sorted(cuts, key=lambda cut: cut[0]):
        line = cut[1]
        widths = tuple(dict.fromkeys((len(t.units), len(t.units[0])) for t in line.teams))
        placed.append((turns[widths, line.rows], cut))
        turns[widths, line.rows] += 1
    return [cut for _, cut in sorted(placed, key=lambda entry: (entry[0], entry[1][0]))]


def _shares(costs: Costs, draft: Draft, units: tuple[Unit, ...]) -> tuple[int, ...]:
    if draft.by_speed:
        return apportion(costs, units, draft.rows)
    return (draft.rows // len(units),) * len(units)


@dataclass(frozen=True, slots=True)
class _Block:
    """Equal stages: one unit of them, its rows of a micro-batch, and how many stages there are."""

    unit: Unit
    rows: int
    number: int
    slope: float
    """Seconds per byte of the stage's gradient ring."""


def _draft(
    costs: Costs,
    blocks: Sequence[_Block],
    rows: int,
    stages: Callable[[], Stages],
    *,
    by_speed: bool,
) -> Draft:
    """With the least seconds of M micro-batches on the slowest stage, or of one on all of them; the
    guess takes both, and the reductions. Where stage s takes t(s, l) for layer l:

    slowest stage >= sum over l of min over s of t(s, l) / t(s, all) / sum over s of 1 / t(s, all)

    by linear programming duality, layers taken as divisible.
    """
    micro_batches = costs.job.global_batch // rows
    times = np.array([_layer_seconds(costs, block) for block in blocks])
    whole = times.sum(axis=1)
    numbers = np.array([block.number for block in blocks])
    slowest = float((times / whole[:, None]).min(axis=0).sum() / (numbers / whole).sum())
    once = float(times.min(axis=0).sum())
    size = sum(layer.parameters for layer in costs.model.layers) * gradient_bytes(costs.job)
    reduction = max(b.slope / len(b.unit) for b in blocks) * size / int(numbers.sum())
    guess = (micro_batches - 1) * slowest + once + reduction
    bound = max(micro_batches * slowest, once)
    places = ((costs.devices[block.unit[0]], len(block.unit)) for block in blocks)
    build = tuple(dict.fromkeys((device.type, device.site, width) for device, width in places))
    return Draft(bound, guess, stages, rows, micro_batches, by_speed, build)


def _by_build(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """The most promising draft of every build, then the second of each: what a thin link between
    two sites costs is not in the guess."""
    turns: Counter[object] = Counter()
    placed = []
    for draft in sorted(drafts, key=lambda draft: draft.guess):
        placed.append((turns[draft.build], draft.guess, draft))
        turns[draft.build] += 1
    return (draft for _, _, draft in sorted(placed, key=lambda entry: entry[:2]))


def _layer_seconds(costs: Costs, block: _Block) -> Array:
    forward, backward = unit_times(costs, block.unit, block.rows)
    return forward + backward


def _ring_slope(costs: Costs, units: Sequence[Unit]) -> float:
    if len(units) == 1:
        return 0.0
    return seconds_per_byte(costs, [ring(costs, tuple(unit[0] for unit in units))])[1]


# Metis


def metis(costs: Costs) -> Found | None:
    """The best plan of Metis's space; None if nothing in it fits."""
    by_type: dict[str, list[str]] = {}
    for device in usable_devices(costs.cluster, costs.job):
        by_type.setdefault(device.type, []).append(device.name)
    widths = list(product(legal_widths(costs), repeat=len(by_type)))
    orders = list(permutations(by_type))
    most = max(40, GROUPED // len(widths) // len(orders))
    number = sum(map(len, by_type.values()))
    sizes = list(dict.fromkeys(group_sizes(number, len(costs.model.layers))))
    known: set[Stages] = set()
    drafts: list[Draft] = []
    for order in orders:
        kinds = [kind for kind in order for _ in by_type[kind]]
        plainest = sorted(sizes, key=partial(_across_types, kinds))[:most]
        for groups, tensors in product(plainest, widths):
            stages = _grouped(costs, order, by_type, groups, dict(zip(order, tensors, strict=True)))
            if stages is not None and stages not in known:
                known.add(stages)
                drafts += _metis_drafts(costs, stages)
    return search(costs, drafts)


def _across_types(kinds: Sequence[str], groups: tuple[int, ...]) -> tuple[bool, int]:
    """Whether groups are unequal, and how many of them hold devices of several types."""
    ends = list(accumulate(groups))
    spans = (len(set(kinds[end - size : end])) > 1 for size, end in zip(groups, ends, strict=True))
    return len(set(groups)) > 1, sum(spans)


def group_sizes(devices: int, most: int) -> Iterator[tuple[int, ...]]:
    """Devices of every stage, for all numbers of stages up to `most`: equal groups, and powers of
    two that are not less than SMALLEST_GROUP of the average."""
    for stages in range(1, min(devices, most) + 1):
        if devices % stages == 0:
            yield (devices // stages,) * stages
        least = max(1.0, devices / stages * SMALLEST_GROUP)
        powers = [1 << i for i in range(devices.bit_length()) if 1 << i >= least]
        for multiset in _multisets(devices, stages, powers):
            for order in sorted(set(permutations(_merged(multiset)))):
                yield tuple(chain.from_iterable(order))


def _multisets(total: int, count: int, powers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ascending sequences of `count` of the powers that add up to `total`."""
    if count == 0:
        if total == 0:
            yield ()
        return
    for i, power in enumerate(powers):
        if power * count > total:
            break
        for rest in _multisets(total - power, count - 1, powers[i:]):
            yield (power, *rest)


def _merged(groups: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Neighbours of equal size joined, the smallest first, until PERMUTED runs are left (or no two
    runs are equal)."""
    runs = [(size,) for size in groups]
    while len(runs) > PERMUTED:
        pair = next((i for i in range(len(runs) - 1) if runs[i] == runs[i + 1]), None)
        if pair is None:
            break
        runs[pair : pair + 2] = [runs[pair] + runs[pair + 1]]
        runs.sort(key=lambda run: (sum(run), run))
    return runs[:]


def _grouped(
    costs: Costs,
    order: Sequence[str],
    by_type: dict[str, list[str]],
    groups: tuple[int, ...],
    tensor_of: dict[str, int],
) -> Stages | None:
    """The devices in this order of types as stages; None where a tensor-parallel group would leave
    its node or its type, or is not whole."""
    names = [name for kind in order for name in by_type[kind]]
    stages, at = [], 0
    for size in groups:
        members = names[at : at + size]
        at += size
        tensor = min(tensor_of[costs.devices[name].type] for name in members)
        if size % tensor:
            return None
        units = tuple(tuple(members[i : i + tensor]) for i in range(0, size, tensor))
        if any(not _together(costs, unit) for unit in units):
            return None
        stages.append(units)
    return tuple(stages)


def _together(costs: Costs, unit: Unit) -> bool:
    found = {(costs.devices[name].node, costs.devices[name].type) for name in unit}
    return len(found) == 1


def _metis_drafts(costs: Costs, stages: Stages) -> Iterator[Draft]:
    slopes = [_ring_slope(costs, units) for units in stages]
    kinds = [distinct_units(costs, units) for units in stages]
    widest = max(map(len, stages))
    for rows in (r for r in divisors(costs.job.global_batch) if r >= widest):
        blocks: dict[object, _Block] = {}
        for units, own, slope in zip(stages, kinds, slopes, strict=True):
            if len(own) == 1 and rows % len(units):
                break
            share = rows // len(units) if len(own) == 1 else apportion(costs, units, rows)[0]
            key = (unit_kind(costs, units[0]), share, slope)
            number = blocks[key].number + 1 if key in blocks else 1
            blocks[key] = _Block(units[0], share, number, slope)
        else:
            yield _draft(
                costs, list(blocks.values()), rows, partial(_as_they_are, stages), by_speed=True
            )


def _as_they_are(stages: Stages) -> Stages:
    return stages


# Sailor


def sailor(costs: Costs) -> Found | None:
    """The best plan of Sailor's space; None if nothing in it fits."""
    kinds = sorted({device.type for device in usable_devices(costs.cluster, costs.job)})
    drafts: list[Draft] = []
    seen: set[object] = set()
    for tensors in product(legal_widths(costs), repeat=len(kinds)):
        zones = _zones(costs, dict(zip(kinds, tensors, strict=True)))
        for number in range(1, len(zones) + 1):
            for order in permutations(zones, number):
                if order not in seen:
                    seen.add(order)
                    drafts += _sailor_drafts(costs, order)
    return search(costs, drafts)


Zone = tuple[Unit, ...]
"""All units of one type at one site."""


def _zones(costs: Costs, tensor_of: dict[str, int]) -> list[Zone]:
    found: dict[tuple[str, str], list[Unit]] = {}
    for tensor in sorted(set(tensor_of.values())):
        for pool in pools(costs, tensor):
            kind = costs.devices[pool.units[0][0]].type
            if tensor_of[kind] == tensor:
                found.setdefault((kind, pool.site), []).extend(pool.units)
    return [tuple(units) for _, units in sorted(found.items())]


def _sailor_drafts(costs: Costs, order: tuple[Zone, ...]) -> Iterator[Draft]:
    """Every data width, and every number of stages on each of these zones, in this order."""
    batch, layers = costs.job.global_batch, len(costs.model.layers)
    units = tuple(chain.from_iterable(order))
    alike = len(order) > 1 and len({len(unit) for unit in units}) == 1
    for data in divisors(batch):
        if alike:
            for depth in range(1, min(len(units) // data, layers) + 1):
                yield from _run_drafts(costs, units, depth, data)
        most = [min(len(zone) // data, layers) for zone in order]
        if min(most) == 0:
            continue
        slopes = [_ring_slope(costs, zone[:data]) for zone in order]
        for depths in (d for d in _depths(most) if sum(d) <= layers):
            ways = {False, data > 1 and max(depths) > 1}
            for rows, across in product(divisors(batch // data), sorted(ways)):
                blocks = [
                    _Block(zone[0], rows, depth, slope)
                    for zone, depth, slope in zip(order, depths, slopes, strict=True)
                ]
                stages = partial(_runs, order, depths, data, across=across)
                yield _draft(costs, blocks, rows * data, stages, by_speed=False)


def _depths(most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    options = [range(1, depth + 1) for depth in most]
    if prod(most) > DEPTH_VECTORS:
        few = [sorted({*(d for d in DEPTHS if d <= depth), depth}) for depth in most]
        return product(*few)
    return product(*options)


def _run_drafts(costs: Costs, units: Zone, depth: int, data: int) -> Iterator[Draft]:
    """Stages of `data` consecutive units each, of whatever types and zones."""
    stages = tuple(units[s * data : (s + 1) * data] for s in range(depth))
    slopes = [_ring_slope(costs, stage) for stage in stages]
    slowest = [max(distinct_units(costs, s), key=partial(pace, costs)) for s in stages]
    for rows in divisors(costs.job.global_batch // data):
        blocks = [_Block(u, rows, 1, slope) for u, slope in zip(slowest, slopes, strict=True)]
        yield _draft(costs, blocks, rows * data, partial(_as_they_are, stages), by_speed=False)


def _runs(order: tuple[Zone, ...], depths: tuple[int, ...], data: int, *, across: bool) -> Stages:
    """Replicas of a stage side by side, or (`across`) stages of a replica."""
    found = []
    for zone, depth in zip(order, depths, strict=True):
        for s in range(depth):
            units = zone[s : depth * data : depth] if across else zone[s * data : (s + 1) * data]
            found.append(units)
    return tuple(found)


RIVALS: dict[str, Callable[[Costs], Found | None]] = {"metis": metis, "sailor": sailor}

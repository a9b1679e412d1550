"""Ranks a space in closed form, the most promising candidates by their lower bound first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from meshwright.errors import ClusterError, Problem
from meshwright.plan.spec import ScheduleName
from meshwright.search.baselines import BASELINES
from meshwright.search.costs import Costs, speeds
from meshwright.search.estimate import Candidate, Estimate, Misfit, evaluate, optimistic_seconds
from meshwright.search.placement import default_placement, placements
from meshwright.search.space import (
    DeviceSet,
    Grid,
    Shape,
    device_sets,
    fewer_devices,
    grids,
    shapes,
    usable_devices,
)
from meshwright.search.template_builds import MOST_CELLS
from meshwright.stopping import raise_if_stopped

MANY_DEVICES = 64
"""Above this number devices are counted by class, and no grid is looked at device by device."""

MANY_CELLS = 1_500_000
"""Devices x layers x layers above which the same holds: layer cuts are found in tables so large."""

LAST_RESORT = 200_000
"""Devices x candidates of the regular grids that are looked at when nothing else has fitted."""

AT_LEAST = 64
"""Candidates that are looked at however short the time is, unless one of them fits."""

FINALISTS = 8
"""Candidates that the simulator ranks again."""

ALIKE = 3
"""Finalists of one grid on one set of devices: neighbours in closed form are neighbours in the
simulator."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Explored:
    """Holds the best candidates of a space by the closed form, and those that do not fit."""

    finalists: tuple[Estimate, ...]
    """Best first."""
    misfits: tuple[Misfit, ...]
    """Most promising first."""
    tried: int


def is_large(costs: Costs) -> bool:
    """True if devices are counted by class, not looked at one by one."""
    devices = len(costs.devices)
    return devices > MANY_DEVICES or devices * len(costs.model.layers) ** 2 > MANY_CELLS


def whole(costs: Costs) -> DeviceSet:
    """Returns every device that offers the job's precision. Raises ClusterError if none does."""
    devices = usable_devices(costs)
    if not devices:
        offers = sorted({p for kind in costs.cluster.types.values() for p in kind.peak})
        raise ClusterError(
            Problem(
                f"cluster {costs.cluster.name}",
                "devices",
                f"none that offers {costs.job.precision}",
                f"at least one device with a peak in {costs.job.precision}",
                f"its devices offer {', '.join(offers)}",
            )
        )
    return DeviceSet(devices=devices)


def usable(costs: Costs, pruned: Counter[str]) -> DeviceSet:
    """Returns the devices of `whole`, and counts all other devices in `pruned`."""
    used = whole(costs)
    if unable := len(costs.devices) - len(used.devices):
        pruned[f"devices that do not offer {costs.job.precision}"] += unable
    return used


def candidates_of(
    costs: Costs, schedules: Sequence[ScheduleName], pruned: Counter[str]
) -> list[Candidate]:
    """Returns the whole space; if nothing in it is possible, that of the most devices that allow
    something.

    Raises ClusterError when no device offers the job's precision.
    """
    devices = usable(costs, pruned).devices
    speed = speeds(costs, sorted({device.type for device in devices}))
    found = [
        candidate
        for used in device_sets(devices, speed)
        for candidate in _on(costs, used, speed, schedules, pruned)
    ]
    if found:
        return found
    for used in fewer_devices(devices, speed):
        found = list(_on(costs, used, speed, schedules, pruned))
        if found:
            break
    return found


def sample_of(costs: Costs, pruned: Counter[str]) -> list[Candidate]:
    """Returns a few of the regular grids of very many devices, evenly spread; if these devices
    allow none, of the most that allow some. They show by how much nothing fits."""
    used = whole(costs)
    speed = speeds(costs, sorted({device.type for device in used.devices}))
    every = _grid_shapes(costs, used, pruned)
    fewer = fewer_devices(used.devices, speed)
    while not every:
        used = next(fewer)
        every = _grid_shapes(costs, used, Counter())
    most = max(8, LAST_RESORT // len(used.devices))
    chosen = every[:: -(-len(every) // most)]
    if len(chosen) < len(every):
        pruned["regular grids beyond a sample"] += len(every) - len(chosen)
    places = {grid: default_placement(used.devices, grid) for grid, _ in chosen}
    return [Candidate(used, places[grid], shape) for grid, shape in chosen]


def _grid_shapes(costs: Costs, used: DeviceSet, pruned: Counter[str]) -> list[tuple[Grid, Shape]]:
    return [
        (grid, shape)
        for grid in grids(used.devices, costs.model, costs.job, pruned)
        if grid.stages * len(costs.model.layers) ** 2 <= MOST_CELLS
        for shape in shapes(grid, costs.job, ("1f1b",))
    ]


def _on(
    costs: Costs,
    used: DeviceSet,
    speed: dict[str, float],
    schedules: Sequence[ScheduleName],
    pruned: Counter[str],
) -> Iterator[Candidate]:
    for grid in grids(used.devices, costs.model, costs.job, pruned):
        places = placements(used.devices, grid, speed)
        for shape in shapes(grid, costs.job, schedules):
            for place in places:
                raise_if_stopped()
                yield Candidate(used, place, shape)


def explore(
    costs: Costs,
    candidates: Iterable[Candidate],
    pruned: Counter[str],
    tell: Progress,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Explored:
    """Returns the best candidates in closed form.

    The most promising by their lower bound come first, so that the rest need not be looked at once
    no bound is below the last finalist. Once `out_of_time`, the search ends as soon as something
    fits, and after AT_LEAST candidates in any case.
    """
    queue = [(_optimistic(costs, c), i, c) for i, c in enumerate(candidates)]
    queue.sort(key=lambda entry: entry[:2])
    finalists: list[Estimate] = []
    misfits: list[Misfit] = []
    for done, (bound, _, candidate) in enumerate(queue):
        if len(finalists) == FINALISTS and bound >= finalists[-1].seconds:
            pruned["lower bound above the finalists"] += len(queue) - done
            break
        if out_of_time() and (finalists or done >= AT_LEAST):
            pruned["beyond the budget"] += len(queue) - done
            break
        if done % 64 == 0:
            tell("searching", done, len(queue))
        raise_if_stopped()
        found = evaluate(costs, candidate)
        if isinstance(found, Misfit):
            pruned["does not fit in memory"] += 1
            misfits.append(found)
        else:
            finalists = _best([*finalists, found])
            pruned["slower in closed form"] += 1
    pruned["slower in closed form"] -= len(finalists)
    tell("searching", len(queue), len(queue))
    return Explored(finalists=tuple(finalists), misfits=tuple(misfits), tried=len(queue))


def _optimistic(costs: Costs, candidate: Candidate) -> float:
    raise_if_stopped()
    return optimistic_seconds(costs, candidate)


def _best(estimates: list[Estimate]) -> list[Estimate]:
    """Returns the finalists among these: best first, few of one grid, no two that differ in their
    placement alone."""
    chosen: list[Estimate] = []
    alike: Counter[object] = Counter()
    seen = set()
    for estimate in sorted(estimates, key=lambda e: e.seconds):
        candidate = estimate.candidate
        family = (candidate.used, candidate.shape.grid)
        same = (candidate.used, candidate.shape, estimate.bounds, estimate.seconds)
        if alike[family] < ALIKE and same not in seen:
            alike[family] += 1
            seen.add(same)
            chosen.append(estimate)
    return chosen[:FINALISTS]


def best_by_hand(costs: Costs, name: str, used: DeviceSet) -> Estimate | Misfit | None:
    """Returns the best hand-made candidate that fits; else the one that misses by least; None if
    there is none. Candidates of AMP are ranked as AMP does and never recompute, the others by our
    own estimate."""
    if name == "amp":
        costs = replace(costs, recomputed=None)
    every = BASELINES[name](costs, used)
    queue = [(0.0 if name == "amp" else _optimistic(costs, c), i, c) for i, c in enumerate(every)]
    best: tuple[float, int, Estimate] | None = None
    misfits = []
    for bound, number, candidate in sorted(queue, key=lambda entry: entry[:2]):
        if best is not None and (name == "amp" or bound > best[0]):
            break
        raise_if_stopped()
        found = evaluate(costs, candidate)
        if isinstance(found, Misfit):
            misfits.append((found.excess_bytes, number, found))
        elif best is None or (found.seconds, number) < best[:2]:
            best = (found.seconds, number, found)
    if best is not None:
        return best[2]
    return min(misfits, key=lambda entry: entry[:2])[2] if misfits else None

"""Ranks a space in closed form, the most promising candidates by their lower bound first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from meshwright.errors import ClusterError, Problem
from meshwright.plan.spec import ScheduleName
from meshwright.search.baselines import BASELINES
from meshwright.search.costs import Costs, speeds
from meshwright.search.estimate import (
    Candidate,
    Estimate,
    Misfit,
    evaluate,
    optimistic_seconds,
)
from meshwright.search.placement import Placement, default_placement, placements
from meshwright.search.space import (
    DeviceSet,
    Grid,
    device_sets,
    fewer_devices,
    grids,
    shapes,
    usable_devices,
)

MANY_DEVICES = 256
"""Above this number the regular grids are a sample: all devices, in cluster order, and no more
candidates than CANDIDATE_DEVICES over the devices; composed strategies cover the rest."""

CANDIDATE_DEVICES = 200_000

FINALISTS = 8
"""Candidates that the simulator ranks again."""

ALIKE = 3
"""Finalists of one grid on one set of devices: neighbours in closed form are neighbours in the
simulator."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Explored:
    """What the closed form says of a space."""

    finalists: tuple[Estimate, ...]
    """Best first."""
    misfits: tuple[Misfit, ...]
    """Most promising first."""
    tried: int


def whole(costs: Costs) -> DeviceSet:
    """Every device that offers the job's precision. Raises ClusterError when there is none."""
    devices = usable_devices(costs.cluster, costs.job)
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


def candidates_of(
    costs: Costs, schedules: Sequence[ScheduleName], dropped: Counter[str]
) -> list[Candidate]:
    """The whole space; if nothing in it is possible, that of the most devices that allow something.

    Raises ClusterError when no device offers the job's precision.
    """
    devices = whole(costs).devices
    if unable := len(costs.devices) - len(devices):
        dropped[f"devices that do not offer {costs.job.precision}"] += unable
    speed = speeds(costs, sorted({device.type for device in devices}))
    if len(devices) > MANY_DEVICES:
        return _sample(costs, DeviceSet(devices=devices), schedules, dropped)
    found = [
        candidate
        for used in device_sets(devices, speed)
        for candidate in _on(costs, used, speed, schedules, dropped)
    ]
    if found:
        return found
    for used in fewer_devices(devices, speed):
        found = list(_on(costs, used, speed, schedules, dropped))
        if found:
            break
    return found


def _sample(
    costs: Costs, used: DeviceSet, schedules: Sequence[ScheduleName], dropped: Counter[str]
) -> list[Candidate]:
    """Regular grids of very many devices, evenly spread over those there are."""
    every = [
        (grid, shape)
        for grid in grids(used.devices, costs.model, costs.job, dropped)
        for shape in shapes(grid, costs.job, schedules[:1])
    ]
    most = max(8, CANDIDATE_DEVICES // len(used.devices))
    chosen = every[:: -(-len(every) // most)] if every else []
    if len(chosen) < len(every):
        dropped["regular grids beyond a sample"] += len(every) - len(chosen)
    places: dict[Grid, Placement] = {}
    for grid, _ in chosen:
        if grid not in places:
            places[grid] = default_placement(used.devices, grid)
    return [Candidate(used, places[grid], shape) for grid, shape in chosen]


def _on(
    costs: Costs,
    used: DeviceSet,
    speed: dict[str, float],
    schedules: Sequence[ScheduleName],
    dropped: Counter[str],
) -> Iterator[Candidate]:
    for grid in grids(used.devices, costs.model, costs.job, dropped):
        places = placements(used.devices, grid, speed)
        for shape in shapes(grid, costs.job, schedules):
            for place in places:
                yield Candidate(used, place, shape)


def explore(
    costs: Costs, candidates: Iterable[Candidate], dropped: Counter[str], tell: Progress
) -> Explored:
    """The best candidates in closed form.

    The most promising by their lower bound come first, so that the rest need not be looked at once
    no bound is below the last finalist.
    """
    queue = [(optimistic_seconds(costs, c), i, c) for i, c in enumerate(candidates)]
    queue.sort(key=lambda entry: entry[:2])
    finalists: list[Estimate] = []
    misfits: list[Misfit] = []
    for done, (bound, _, candidate) in enumerate(queue):
        if len(finalists) == FINALISTS and bound >= finalists[-1].seconds:
            dropped["lower bound above the finalists"] += len(queue) - done
            break
        if done % 64 == 0:
            tell("searching", done, len(queue))
        found = evaluate(costs, candidate)
        if isinstance(found, Misfit):
            dropped["does not fit in memory"] += 1
            misfits.append(found)
        else:
            finalists = _best([*finalists, found])
            dropped["slower in closed form"] += 1
    dropped["slower in closed form"] -= len(finalists)
    tell("searching", len(queue), len(queue))
    return Explored(finalists=tuple(finalists), misfits=tuple(misfits), tried=len(queue))


def _best(estimates: list[Estimate]) -> list[Estimate]:
    """The finalists among these: best first, few of one grid, none that only looks different."""
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
    """The best hand-made candidate that fits; else the nearest to it; None if there is none. AMP
    chooses by its own ranking, the others by ours."""
    found = [evaluate(costs, candidate) for candidate in BASELINES[name](costs, used)]
    fitting = [e for e in found if isinstance(e, Estimate)]
    if fitting:
        return fitting[0] if name == "amp" else min(fitting, key=lambda e: e.seconds)
    misfits = [m for m in found if isinstance(m, Misfit)]
    return min(misfits, key=lambda m: m.excess_bytes, default=None)

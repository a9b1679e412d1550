"""Published strategies (one dp x tp x pp grid, ranks in order) as candidates of the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.constants import Calibration
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job
from meshwright.search.costs import Costs, costs_of
from meshwright.search.estimate import Candidate, Misfit, evaluate, given_seconds
from meshwright.search.explain import as_plan
from meshwright.search.placement import default_placement
from meshwright.search.space import DeviceSet, Grid, Shape
from meshwright.simulate.simulator import simulate_plan

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class World:
    """A model trained on a cluster, with what was measured of its layers."""

    model: LayerGraph
    cluster: Cluster
    job: Job
    profile: Profile


@dataclass(frozen=True, slots=True)
class Trial:
    """One strategy that was run."""

    world: int
    """Index of its World."""
    data: int
    tensor: int
    stages: int
    rows: int
    """Of a micro-batch on each replica."""
    batch: int
    bounds: tuple[int, ...]


def candidate(world: World, trial: Trial) -> Candidate:
    """The trial as the search would write it."""
    devices = devices_of(world.cluster)[: trial.data * trial.tensor * trial.stages]
    grid = Grid(data=trial.data, tensor=trial.tensor, stages=trial.stages)
    return Candidate(
        used=DeviceSet(devices=devices),
        placement=default_placement(devices, grid),
        shape=Shape(
            grid=grid,
            rows=trial.rows,
            micro_batches=trial.batch // (trial.data * trial.rows),
            schedule="1f1b",
        ),
        fixed=trial.bounds,
    )


def costs_under(world: World, calibration: Calibration) -> Costs:
    """The prices of a world under given constants."""
    profile = Profile(
        model=world.profile.model,
        sequence=world.profile.sequence,
        layers=world.profile.layers,
        calibration=calibration,
    )
    return costs_of(world.model, world.cluster, world.job, profile)


def predict(
    worlds: Sequence[World],
    trials: Sequence[Trial],
    calibration: Calibration,
    runs: NDArray[np.int64],
) -> Array:
    """Seconds of a step of the trials with these indices."""
    prices: dict[int, Costs] = {}
    found = []
    for index in runs:
        trial = trials[int(index)]
        if trial.world not in prices:
            prices[trial.world] = costs_under(worlds[trial.world], calibration)
        costs = prices[trial.world]
        found.append(given_seconds(costs, candidate(worlds[trial.world], trial)))
    return np.array(found)


def excess_bytes(
    worlds: Sequence[World], trials: Sequence[Trial], calibration: Calibration
) -> Array:
    """Bytes by which each trial overfills its worst device; 0 where it fits."""
    prices = [costs_under(world, calibration) for world in worlds]
    found = []
    for trial in trials:
        result = evaluate(prices[trial.world], candidate(worlds[trial.world], trial))
        found.append(result.excess_bytes if isinstance(result, Misfit) else 0.0)
    return np.array(found)


def simulate(world: World, trials: Sequence[Trial], calibration: Calibration) -> Array:
    """Seconds of a step of every trial, played by the simulator."""
    costs = costs_under(world, calibration)
    found = []
    for trial in trials:
        plan = as_plan(costs, candidate(world, trial), trial.bounds, "")
        found.append(simulate_plan(plan, world.model, world.cluster, costs.profile).step_seconds)
    return np.array(found)

"""Published strategies (one dp x tp x pp grid, ranks in order) as pipelines of the search."""

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
from meshwright.search.baselines import in_rank_order, launched
from meshwright.search.candidate import CandidatePipeline, excess_bytes, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import Costs, costs_of
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


def pipeline_of(world: World, trial: Trial) -> CandidatePipeline:
    """The trial as the search would write it."""
    count = trial.data * trial.tensor * trial.stages
    names = [device.name for device in devices_of(world.cluster)[:count]]
    stages = in_rank_order(names, (trial.data, trial.tensor, trial.stages))
    micro_batches = trial.batch // (trial.data * trial.rows)
    return launched(stages, trial.rows, micro_batches, trial.bounds)


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
        pipeline = pipeline_of(worlds[trial.world], trial)
        found.append(candidate_seconds(costs, (pipeline,), "1f1b"))
    return np.array(found)


def overfull_bytes(
    worlds: Sequence[World], trials: Sequence[Trial], calibration: Calibration
) -> Array:
    """Bytes by which each trial overfills its worst device; 0 where it fits."""
    prices = [costs_under(world, calibration) for world in worlds]
    found = []
    for trial in trials:
        pipeline = pipeline_of(worlds[trial.world], trial)
        found.append(max(0.0, excess_bytes(prices[trial.world], pipeline, "1f1b")))
    return np.array(found)


def simulate(world: World, trials: Sequence[Trial], calibration: Calibration) -> Array:
    """Seconds of a step of every trial, played by the simulator."""
    costs = costs_under(world, calibration)
    found = []
    for trial in trials:
        plan = plan_of(costs, (pipeline_of(world, trial),), "1f1b")
        found.append(simulate_plan(plan, world.model, world.cluster, costs.profile).step_seconds)
    return np.array(found)

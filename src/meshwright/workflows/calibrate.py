"""Calibrates the cost model on a user's own cluster: proposes plans to run, and fits constants to
the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from meshwright import files
from meshwright.cluster.spec import Cluster, cluster_fingerprint, devices_of
from meshwright.cost.constants import DEFAULT_DEVICE, DEFAULT_SYSTEM, DEVICE_NAMES, Calibration
from meshwright.cost.fit_constants import (
    FitParameter,
    calibrate_constants,
    fit_position,
    fit_value,
    most_informative,
    with_values,
)
from meshwright.cost.profile import Profile
from meshwright.cost.reached_links import reached_links
from meshwright.errors import FitError, Problem, ProfileError
from meshwright.formats import parse_text
from meshwright.plan.spec import Plan
from meshwright.records import parse
from meshwright.runtime.run_folder import METRICS, PLAN, Metrics, load_settings
from meshwright.search.candidate import CandidatePipeline, plan_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import Costs, costs_of
from meshwright.search.regular import regular_pipelines, with_best_cuts
from meshwright.simulate.simulator import simulate_plan
from meshwright.workflows.session import Session, reopen_plan

Array = NDArray[np.float64]

CANDIDATES = 150
"""Number of regular pipelines whose sensitivities are computed, evenly drawn from all."""
SLOWEST = 3.0
"""Longest predicted step of a proposal, relative to the fastest candidate considered."""
WARM_UP = 3
"""Number of first steps of a run that are not counted."""
Proposals = Annotated[int, Field(ge=0, le=1000)]
"""Number of plans to propose; 0: none, and runs are fitted instead."""
DERIVATIVE = 0.02
"""Step of the numerical derivative, as a share of a constant's range."""


def fit_parameters_for(cluster: Cluster, profile: Profile | None) -> tuple[FitParameter, ...]:
    """Returns the constants to fit on a cluster: efficiencies of types that were not profiled,
    overheads of host and framework, and efficiencies of links that exist and were not measured."""
    types = tuple(sorted({device.type for device in devices_of(cluster)}))
    measured = {entry.device for entry in profile.layers} if profile else set()
    found = [
        FitParameter(name=name, types=(kind,), start=getattr(cluster.types[kind], name))
        for kind in types
        if kind not in measured
        for name in ("matmul_efficiency", "memory_efficiency")
    ]
    names = ["launch_forward", "launch_backward", "ring_step", "boundary", "step"]
    links = profile.links if profile else None
    if not (links and links.inside):
        names.append("inside_efficiency")
    if len(cluster.nodes) > 1 and not (links and links.network):
        names.append("network_efficiency")
    for name in names:
        of_device = name in DEVICE_NAMES
        default = getattr(DEFAULT_DEVICE if of_device else DEFAULT_SYSTEM, name)
        start = _reached_share(cluster, name) if default is None else default
        found.append(FitParameter(name=name, types=types if of_device else (), start=start))
    return tuple(found)


def _reached_share(cluster: Cluster, name: str) -> float:
    """Returns the share of their bandwidth that the links of the first node are held to reach."""
    reached, node = reached_links(cluster, None).nodes[0], cluster.nodes[0]
    if name == "inside_efficiency":
        return reached.inside.bandwidth / node.inside.bandwidth
    return reached.network.bandwidth / node.network.bandwidth


def run_seconds(folder: Path) -> float:
    """Returns the median step seconds of a run without its first steps. Raises ProfileError."""
    path = folder / METRICS
    if not files.exists(path):
        wanted = "a run folder, as `meshwright train` writes it"
        raise ProfileError(Problem(str(path), "", "no such file", wanted))
    seconds = [
        _metrics(text, f"{path}:{number}").step_seconds
        for number, text in files.read_lines(path, error=ProfileError)
    ]
    warm = seconds[WARM_UP:]
    if not warm:
        found, wanted = f"{len(seconds)} steps", f"more than {WARM_UP}"
        raise ProfileError(Problem(str(path), "", found, wanted))
    return median(warm)


def _metrics(text: str, source: str) -> Metrics:
    """Parses the line of one step. A killed run may leave an incomplete last line, which the error
    explains."""
    mend = "take the line away if it is the last one of a run that was stopped"
    try:
        data = parse_text(text, source=source, error=ProfileError, finite=False)
        return parse(data, Metrics, source=source, error=ProfileError)
    except ProfileError as failure:
        raise ProfileError(*(replace(each, mend=mend) for each in failure.problems)) from None


def profile_from_runs(folders: Sequence[Path], cluster: Path | None = None) -> Profile:
    """Returns the profile of the runs' cluster with constants fitted to them, and their error bar.

    All runs must be of one model on one cluster. Raises ProfileError, and whatever `reopen_plan`
    raises."""
    if not folders:
        wanted = "at least one run folder"
        raise ProfileError(Problem("calibrate", "runs", "nothing", wanted))
    measured = np.array([run_seconds(folder) for folder in folders])
    opened = [
        reopen_plan(folder / PLAN, cluster=cluster, runtime="meshwright") for folder in folders
    ]
    session = opened[0][0]
    strangers = [
        Problem(str(folder), "model", other.model.name, session.model.name, "calibrate it apart")
        for folder, (other, _) in zip(folders, opened, strict=True)
        if (other.model.name, other.cluster) != (session.model.name, session.cluster)
    ]
    ProfileError.check(strangers)
    plans = [found.plan for _, found in opened]
    options = [load_settings(folder, error=ProfileError).options for folder in folders]
    clipped = [
        each.waits_for_norm(plan.job.precision) for each, plan in zip(options, plans, strict=True)
    ]
    base = base_profile(session)

    def seconds(constants: Calibration, runs: NDArray[np.int64]) -> Array:
        profile = replace(base, calibration=constants)
        simulated = partial(
            simulate_plan, model=session.model, cluster=session.cluster, profile=profile
        )
        steps = [simulated(plans[i], clipped=clipped[i]) for i in map(int, runs)]
        return np.array([step.step_seconds for step in steps])

    parameters = fit_parameters_for(session.cluster, session.profile)
    source = ", ".join(str(folder) for folder in folders)
    return replace(
        base, calibration=calibrate_constants(seconds, measured, parameters, source=source)
    )


def base_profile(session: Session) -> Profile:
    """Returns the session's profile without fitted constants."""
    empty = Profile(model=session.model.name, sequence=session.model.sequence)
    return replace(session.profile or empty, calibration=None)


def propose_plans(session: Session, count: int) -> tuple[Plan, ...]:
    """Returns the plans whose step times reveal most about the constants: among plans that fit and
    are not slow, those whose sensitivities to the constants differ most. Raises FitError if no plan
    fits."""
    base = base_profile(session)
    plain = costs_of(session.model, session.cluster, session.job, base)
    fitting = _fitting(plain)
    if not fitting:
        raise FitError(Problem("calibrate", "cluster", "no plan that fits", "one that does"))
    seconds = [candidate_seconds(plain, (pipeline,), "1f1b") for pipeline in fitting]
    limit = SLOWEST * min(seconds)
    short = [each for each, own in zip(fitting, seconds, strict=True) if own <= limit]
    chosen = most_informative(_sensitivities(session, base, short), count)
    cluster_print = cluster_fingerprint(session.cluster)
    return tuple(plan_of(plain, (short[i],), "1f1b", cluster_print) for i in chosen)


def _fitting(costs: Costs) -> list[CandidatePipeline]:
    every = regular_pipelines(costs, CANDIDATES)
    found = (with_best_cuts(costs, pipeline, "1f1b") for pipeline in every)
    return [pipeline for pipeline in found if pipeline]


def _sensitivities(
    session: Session, base: Profile, pipelines: Sequence[CandidatePipeline]
) -> Array:
    """Returns the relative change of every candidate's step per constant, over the constant's
    range."""
    parameters = fit_parameters_for(session.cluster, session.profile)
    start = [
        fit_value(parameter, fit_position(parameter, parameter.start or 0.0))
        for parameter in parameters
    ]

    def all_seconds(values: Sequence[float]) -> Array:
        profile = replace(base, calibration=with_values(Calibration(), parameters, values))
        costs = costs_of(session.model, session.cluster, session.job, profile)
        return np.array([candidate_seconds(costs, (each,), "1f1b") for each in pipelines])

    origin, columns = all_seconds(start), []
    for index, parameter in enumerate(parameters):
        place = fit_position(parameter, start[index])
        ahead = place + DERIVATIVE if place < 0.5 else place - DERIVATIVE
        moved = [*start[:index], fit_value(parameter, ahead), *start[index + 1 :]]
        columns.append((all_seconds(moved) / origin - 1) / (ahead - place))
    return np.array(columns).T

"""Fits constants of the cost model to recorded runs, and names runs that would tell most of what is
left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.constants import (
    Calibration,
)
from meshwright.cost.fit_constants import (
    OUTLIER_ERROR,
    FitParameter,
    Predict,
    cross_validation_folds,
    error_bar,
    fit_constants,
    fit_position,
    fit_value,
    most_informative,
    values_of,
    with_values,
)
from meshwright.cost.profile import Profile
from meshwright.cost.runtimes import RUNTIMES
from meshwright.errors import Problem, ProfileError
from meshwright.recorded.price import (
    Machines,
    PreparedRun,
    predicted_bytes,
    predicted_seconds,
    prepare,
    runtime_of,
)
from meshwright.recorded.spec import SHARDED, RecordedRun, step_seconds_of
from meshwright.recorded.validate import run_problems
from meshwright.search.space import divisors

Array = NDArray[np.float64]

OF_A_TYPE = ("matmul_efficiency", "attention_efficiency", "memory_efficiency")
OF_ALL_TYPES = ("launch_forward", "launch_backward", "layer_overhead", "optimizer_traffic")
OF_THE_SYSTEM = (
    *("inside_efficiency", "network_efficiency", "ring_step", "boundary", "shard_exposure"),
    *("instruction", "step"),
)
"""Constants that may be fitted: those of each device type, those that all types share because they
describe host and framework, and those of links and system."""
NOTICED = 0.01
"""Least relative change of some run's step over a constant's whole range; a constant that changes
them less is not fitted, since the runs say nothing of it."""
LARGE: tuple[Mapping[str, float], ...] = (
    {"launch_forward": 1e-3, "launch_backward": 1e-3},
    {"ring_step": 2e-5, "boundary": 5e-5},
)
"""Constants whose default is next to nothing, with values that are usual where they matter: a layer
in an eager framework, NCCL steps of ranks that are out of step. Fits begin there too: host times
below those of the device change no step, so that a descent from the default sees no slope."""
DERIVATIVE = 0.02
"""Step of the numerical derivative, as a share of a constant's range."""
ONE_BY_ONE = 5
"""Up to twice as many runs are each left out on their own; more are dealt out to as many folds."""
SLOWEST = 3.0
"""Longest predicted step of a proposal, over that of the fastest layout considered."""
CANDIDATES = 60
"""Layouts that are considered for proposals, evenly drawn from all."""
MOST_ROWS = 16
"""Most rows of a proposed micro-batch."""


@dataclass(frozen=True, slots=True)
class RunsFit:
    """Holds the constants fitted to recorded runs, and how well they predict."""

    profile: Profile
    parameters: tuple[FitParameter, ...]
    runs: tuple[PreparedRun, ...]
    """Those with a measured step."""
    measured: Array
    default: Array
    """Seconds predicted from the default constants."""
    fitted: Array
    left_out: Array
    """Seconds of each run predicted from constants fitted to the others."""


def _profile(runs: Sequence[PreparedRun], constants: Calibration | None) -> Profile:
    graph = runs[0].model
    return Profile(model=graph.name, sequence=graph.sequence, calibration=constants)


def _seconds(runs: Sequence[PreparedRun], constants: Calibration | None) -> Array:
    profile = _profile(runs, constants)
    return np.array([predicted_seconds(run, profile) for run in runs])


def _base(runs: Sequence[PreparedRun]) -> Calibration:
    """Returns the constants of the runs' framework, from which a fit departs."""
    known = RUNTIMES[runtime_of(runs[0].run)]
    types = sorted({kind for run in runs for kind in run.cluster.types})
    devices = dict.fromkeys(types, known.device)
    return Calibration(devices=devices, others=known.device, system=known.system)


def _candidates(runs: Sequence[PreparedRun]) -> Iterator[FitParameter]:
    """Yields every constant that may be fitted, with its starting value."""
    types = {kind.name: kind for run in runs for kind in run.cluster.types.values()}
    known = RUNTIMES[runtime_of(runs[0].run)]
    for name in sorted(types):
        for constant in OF_A_TYPE:
            start = getattr(types[name], constant)
            yield FitParameter(name=constant, types=(name,), start=start)
    for constant in OF_ALL_TYPES:
        start = getattr(known.device, constant)
        yield FitParameter(name=constant, types=tuple(sorted(types)), start=start)
    for constant in OF_THE_SYSTEM:
        yield FitParameter(name=constant, start=getattr(known.system, constant))


def _slopes(
    runs: Sequence[PreparedRun], parameters: Sequence[FitParameter], values: Sequence[float]
) -> Array:
    """Returns the relative change of every run's step per constant, over the constant's range:
    [runs, constants]."""
    origin = _seconds(runs, with_values(_base(runs), parameters, values))
    columns = []
    for index, parameter in enumerate(parameters):
        place = fit_position(parameter, values[index])
        ahead = place + DERIVATIVE if place < 0.5 else place - DERIVATIVE
        moved = [*values[:index], fit_value(parameter, ahead), *values[index + 1 :]]
        there = _seconds(runs, with_values(_base(runs), parameters, moved))
        columns.append((there / origin - 1) / (ahead - place))
    return np.array(columns).T.reshape(len(runs), len(parameters))


def _starts(parameters: Sequence[FitParameter]) -> list[float]:
    return [fit_value(each, fit_position(each, each.start or 0.0)) for each in parameters]


def parameters_told(runs: Sequence[PreparedRun]) -> tuple[FitParameter, ...]:
    """Returns the constants on which the step of at least one run depends: those that change it
    between their starting value and an end of their range."""
    every = tuple(_candidates(runs))
    starts = _starts(every)
    origin = _seconds(runs, with_values(_base(runs), every, starts))
    found = []
    for index, parameter in enumerate(every):
        for end in (0.0, 1.0):
            moved = [*starts[:index], fit_value(parameter, end), *starts[index + 1 :]]
            there = _seconds(runs, with_values(_base(runs), every, moved))
            if abs(there / origin - 1).max() >= NOTICED:
                found.append(parameter)
                break
    return tuple(found)


def _beginnings(parameters: Sequence[FitParameter]) -> Iterator[list[float]]:
    """Yields values at which a fit may begin: the starting ones, and these with each group of
    LARGE at its large values."""
    starts = _starts(parameters)
    yield starts
    for group in LARGE:
        pairs = zip(parameters, starts, strict=True)
        larger = [max(start, group.get(each.name, 0.0)) for each, start in pairs]
        if larger != starts:
            yield larger


def _best_fit(
    seconds: Predict, measured: Array, parameters: Sequence[FitParameter], base: Calibration
) -> Calibration:
    """Fits all runs from several beginnings, and returns the fit that misses them least."""
    fits = [
        fit_constants(seconds, measured, parameters, start=base, near=near)
        for near in _beginnings(parameters)
    ]

    def error(constants: Calibration) -> float:
        misses = seconds(constants, np.arange(len(measured))) / measured - 1
        return float(np.sqrt(misses**2 + OUTLIER_ERROR**2).sum())

    return min(fits, key=error)


def fit_runs(runs: Sequence[PreparedRun], *, source: str) -> RunsFit:
    """Fits constants to the runs of one framework whose step was measured, within their plausible
    ranges and with the error of outliers counted linearly, and takes the error bar from runs that
    were left out. Raises ProfileError if there are none, or runs of several frameworks."""
    timed = tuple(run for run in runs if step_seconds_of(run.run) is not None)
    if not timed:
        wanted = "at least one run with a step or a throughput"
        raise ProfileError(Problem(source, "step", "nothing measured", wanted))
    frameworks = sorted({run.run.framework for run in timed})
    if len(frameworks) > 1:
        wanted = "one framework: host times and overlap are its own"
        mend = "put each into a file of its own"
        raise ProfileError(Problem(source, "framework", ", ".join(frameworks), wanted, mend))
    measured = np.array([step_seconds_of(run.run) for run in timed], dtype=np.float64)

    def seconds(constants: Calibration, chosen: NDArray[np.int64]) -> Array:
        return _seconds([timed[int(index)] for index in chosen], constants)

    parameters, base = parameters_told(timed), _base(timed)
    everything = np.arange(len(timed))
    found = _best_fit(seconds, measured, parameters, base)
    near = values_of(found, parameters)
    left_out = np.zeros(len(timed))
    fold = np.array(cross_validation_folds(len(timed), ONE_BY_ONE))
    for label in range(int(fold.max()) + 1):
        own, others = np.flatnonzero(fold == label), np.flatnonzero(fold != label)
        apart = base
        if len(others):
            apart = fit_constants(seconds, measured, parameters, start=base, runs=others, near=near)
        left_out[own] = seconds(apart, own)
    constants = replace(found, error=error_bar(left_out, measured), source=source)
    return RunsFit(
        profile=_profile(timed, constants),
        parameters=parameters,
        runs=timed,
        measured=measured,
        default=_seconds(timed, None),
        fitted=seconds(found, everything),
        left_out=left_out,
    )


def median_error(predicted: Array, measured: Array) -> float:
    """Returns the median of |predicted / measured - 1|."""
    return float(np.median(abs(predicted / measured - 1)))


def memory_errors(runs: Sequence[PreparedRun]) -> Array:
    """Returns predicted / measured - 1 of the memory of the runs that say it; memory has no
    constants that are fitted."""
    measured = [(run, run.run.memory) for run in runs if run.run.memory]
    return np.array([predicted_bytes(run) / memory - 1 for run, memory in measured])


def _layouts(run: RecordedRun) -> Iterator[RecordedRun]:
    """Yields every regular layout of a run's model, batch and devices, without measurements. Where
    weights or gradients are sharded only the micro-batch varies."""
    bare = replace(run, step=None, throughput=None, memory=None, schedule=None, chunks=1)
    sharded = run.sharding in SHARDED
    widths = [1] if sharded else divisors(min(run.devices, run.devices_per_node))
    for tensor in widths:
        for stages in [1] if sharded else divisors(run.devices // tensor):
            data = run.devices // tensor // stages
            for rows in divisors(max(1, run.global_batch // data)):
                if rows > MOST_ROWS:
                    break
                name = f"dp{data}-tp{tensor}-pp{stages}-rows{rows}"
                yield replace(
                    bare,
                    run=f"{run.model}-{run.device}-{run.devices}-{name}",
                    data=data,
                    tensor=tensor,
                    stages=stages,
                    rows=rows,
                    source="",
                    assumptions="",
                )


def _world(run: RecordedRun) -> tuple[object, ...]:
    """Returns what runs have in common that differ in their layouts alone."""
    return run.model, run.device, run.devices, run.global_batch, run.sequence, run.precision


def _identity(run: RecordedRun) -> tuple[object, ...]:
    layout = (run.data, run.tensor, run.stages, run.rows)
    return (*_world(run), *layout, run.recompute, run.sharding)


def _untried(fit: RunsFit, machines: Mapping[str, Machines]) -> list[PreparedRun]:
    """Returns layouts that were not run, that fit into memory and are not slow."""
    seen = {_identity(run.run) for run in fit.runs}
    found: list[RecordedRun] = []
    for run in fit.runs:
        for layout in _layouts(run.run):
            legal = not any(run_problems(replace(layout, step=1.0), ""))
            if legal and _identity(layout) not in seen:
                seen.add(_identity(layout))
                found.append(layout)
    kept = []
    for layout in found[:: max(1, -(-len(found) // CANDIDATES))]:
        try:
            ready = prepare(layout, machines)
        except ProfileError:
            continue
        if predicted_bytes(ready) <= ready.cluster.types[layout.device].memory:
            kept.append(ready)
    return kept


def propose_runs(
    fit: RunsFit, machines: Mapping[str, Machines], count: int
) -> tuple[RecordedRun, ...]:
    """Returns layouts of the same models and devices that are worth a short run: each in turn the
    one whose step is least certain after the runs so far, among those that fit and are not slow."""
    untried = _untried(fit, machines)
    if not untried:
        return ()
    constants = fit.profile.calibration or Calibration()
    values = values_of(constants, fit.parameters)
    seconds = _seconds(untried, constants)
    fastest: dict[tuple[object, ...], float] = {}
    for run, own in zip(untried, seconds, strict=True):
        world = _world(run.run)
        fastest[world] = min(own, fastest.get(world, own))
    pairs = zip(untried, seconds, strict=True)
    quick = [run for run, own in pairs if own <= SLOWEST * fastest[_world(run.run)]]
    known = _slopes(fit.runs, fit.parameters, values)
    chosen = most_informative(_slopes(quick, fit.parameters, values), count, known)
    return tuple(quick[index].run for index in chosen)

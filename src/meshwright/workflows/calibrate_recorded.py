"""Calibrates the cost model to a table of runs of other tools: reads, checks, predicts and fits
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from meshwright.cluster.files import load_cluster
from meshwright.errors import Problem, ProfileError
from meshwright.model.load import load_model
from meshwright.recorded.files import placed_runs
from meshwright.recorded.fit import RunsFit, fit_runs, median_error, memory_errors
from meshwright.recorded.price import Machines, PreparedRun, machines_of, prepare
from meshwright.recorded.validate import device_problems


def prepared_runs(path: Path, machines: dict[str, Machines]) -> tuple[PreparedRun, ...]:
    """Reads a runs file, checks it against the devices that it names, and prepares its runs. Raises
    ProfileError with every mistake found."""
    ready: list[PreparedRun] = []
    problems: list[Problem] = []
    for place, run in placed_runs(path):
        kind = machines.get(run.device)
        wrong = list(device_problems(run, kind.type, place)) if kind else []
        if not wrong:
            try:
                ready.append(prepare(run, machines, place))
            except ProfileError as failure:
                wrong += failure.problems
        problems += wrong
    ProfileError.check(problems)
    return tuple(ready)


def fit_runs_file(
    path: Path, cluster: Path | None = None, model: str = "", sequence: int = 0
) -> tuple[RunsFit, dict[str, Machines], tuple[PreparedRun, ...]]:
    """Fits constants to the runs of a file; also returns the machines that it may name, and all its
    runs.

    The profile is for `model` at `sequence` tokens, in the precision of the first run; without a
    model, for that of the runs, which must then be of one. Raises ProfileError, and whatever
    `load_cluster` and `load_model` raise."""
    machines = machines_of(load_cluster(cluster) if cluster else None)
    runs = prepared_runs(path, machines)
    fit = fit_runs(runs, source=str(path))
    if model:
        graph = load_model(model, sequence, fit.runs[0].run.precision)
        profile = replace(fit.profile, model=graph.name, sequence=sequence)
        return replace(fit, profile=profile), machines, runs
    names = sorted({f"{run.run.model} at {run.run.sequence} tokens" for run in fit.runs})
    if len(names) > 1:
        wanted = "runs of one model, or --model and --sequence: a profile is of one"
        raise ProfileError(Problem(str(path), "model", ", ".join(names), wanted))
    return fit, machines, runs


def fit_sentences(fit: RunsFit, runs: Sequence[PreparedRun]) -> Iterator[str]:
    """Yields what there is to say of a fit, a line each."""
    names = ", ".join(dict.fromkeys(parameter.name for parameter in fit.parameters))
    number = len(fit.runs)
    yield f"{number} runs of {fit.runs[0].run.framework} tell of {names}"
    errors = (median_error(each, fit.measured) for each in (fit.default, fit.fitted, fit.left_out))
    before, after, apart = (f"{error:.1%}" for error in errors)
    yield f"median error of a step: {before} without a fit, {after} fitted, {apart} left out"
    constants = fit.profile.calibration
    if constants and constants.error:
        low, high = constants.error.low, constants.error.high
        yield f"left out, four of five runs took {low:.2f} to {high:.2f} of the predicted"
    worst = int(np.argmax(abs(fit.left_out / fit.measured - 1)))
    miss = fit.left_out[worst] / fit.measured[worst] - 1
    yield f"farthest when left out: {fit.runs[worst].run.run}, predicted {miss:+.0%}"
    memory = memory_errors(runs)
    if len(memory):
        middle = float(np.median(abs(memory)))
        yield f"memory of {len(memory)} runs: median error {middle:.1%} (nothing of it is fitted)"

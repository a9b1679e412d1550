"""Fits the constants of the cost model to measured step times and estimates the remaining error.

The fit has few parameters. Each stays inside its plausible range and is pulled mildly towards its
starting value, so that a constant which the measurements do not determine keeps that value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.constants import (
    CONSTANTS,
    DEVICE_NAMES,
    Calibration,
    DeviceConstants,
    ErrorBar,
)
from meshwright.records import record

Array = NDArray[np.float64]
Predict = Callable[[Calibration, NDArray[np.int64]], Array]
"""A function of constants and of indices of runs that returns the predicted seconds of these
runs."""

OUTLIER_ERROR = 0.05
"""The relative error above which a run counts linearly instead of quadratically, so that outliers
do not bend the fit."""
PRIOR_ERROR = 0.05
"""The relative error that the fit tolerates rather than move a constant from one end of its range
to the other: the strength of the pull towards the starting values."""
DERIVATIVE_STEP = 1e-3
"""The step of the numerical derivatives, as a share of a constant's range."""
MAX_ITERATIONS = 15
"""The largest number of Gauss-Newton steps."""


@record
class FitParameter:
    """Names one parameter of the fit: a constant shared by some device types, or one of the
    system."""

    name: str
    types: tuple[str, ...] = ()
    """The device types that share the constant; empty for a constant of the system."""
    start: float | None = None
    """The starting value; None stands for the middle of the range."""
    low: float = field(default=-1.0)
    """The lower end of the range; a negative number stands for that of CONSTANTS."""
    high: float = field(default=-1.0)
    """The upper end of the range; a negative number stands for that of CONSTANTS."""


def _range(parameter: FitParameter) -> tuple[float, float]:
    known = CONSTANTS[parameter.name]
    return (
        known.low if parameter.low < 0 else parameter.low,
        known.high if parameter.high < 0 else parameter.high,
    )


def fit_value(parameter: FitParameter, place: float) -> float:
    """Returns the value at position `place` in [0, 1] of a parameter's range.

    The scale is geometric, or linear where the range begins at zero: in a range from 1 to 100,
    place 0.5 is the value 10.
    """
    low, high = _range(parameter)
    if low > 0:
        return float(low * (high / low) ** place)
    return float(low + (high - low) * place)


def fit_position(parameter: FitParameter, value: float) -> float:
    """Returns the position in [0, 1] of a value in its range: the inverse of `fit_value`.

    A value outside the range gets the position of the nearer end.
    """
    low, high = _range(parameter)
    inside = min(max(value, low), high)
    if low > 0:
        return float(np.log(inside / low) / np.log(high / low))
    return (inside - low) / (high - low)


def with_values(
    start: Calibration, parameters: Sequence[FitParameter], values: Sequence[float]
) -> Calibration:
    """Returns the calibration with these parameters set to these values."""
    devices, system = dict(start.devices), start.system
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.name not in DEVICE_NAMES:
            system = replace(system, **{parameter.name: value})
        for kind in parameter.types:
            before = devices.get(kind, DeviceConstants())
            devices[kind] = replace(before, **{parameter.name: value})
    return replace(start, devices=devices, system=system)


def fit_constants(
    predict: Predict,
    measured: Array,
    parameters: Sequence[FitParameter],
    *,
    start: Calibration | None = None,
    runs: NDArray[np.int64] | None = None,
    near: Sequence[float] | None = None,
) -> Calibration:
    """Returns the constants whose predictions come closest to the measured seconds.

    The fit minimises the sum over runs of sqrt(e^2 + SOFT^2), with e the relative error, plus the
    pull, by iteratively reweighted least squares: damped Gauss-Newton steps with numerical
    derivatives that keep every parameter inside its range. `runs` holds the indices of the runs to
    fit; None fits all of them. `near` are values of the parameters at which the descent begins, if
    other than those that they are pulled to.
    """
    base = start or Calibration()
    chosen = np.arange(len(measured)) if runs is None else runs

    def values(places: Array) -> list[float]:
        return [
            fit_value(parameter, place) for parameter, place in zip(parameters, places, strict=True)
        ]

    def errors(places: Array) -> Array:
        found = predict(with_values(base, parameters, values(places)), chosen)
        return found / measured[chosen] - 1

    origin = np.array([0.5 if k.start is None else fit_position(k, k.start) for k in parameters])
    places = _descend(errors, origin, origin if near is None else _places(parameters, near))
    return with_values(base, parameters, values(places))


def _places(parameters: Sequence[FitParameter], values: Sequence[float]) -> Array:
    """Returns the positions of values in the ranges of their parameters."""
    pairs = zip(parameters, values, strict=True)
    return np.array([fit_position(parameter, value) for parameter, value in pairs])


def _descend(errors: Callable[[Array], Array], origin: Array, begin: Array) -> Array:
    """Minimises the robust error plus the pull towards the starting values `origin`, from `begin`
    on.

    The result is the position of every parameter in its range."""
    places, damping = begin.copy(), 1e-2
    residual = errors(places)
    for _ in range(MAX_ITERATIONS):
        slope = _slopes(errors, places, residual)
        weight = 1 / np.sqrt(residual**2 + OUTLIER_ERROR**2)
        matrix = (
            slope.T @ (slope * weight[:, None])
            + np.eye(len(places)) * PRIOR_ERROR**2 / OUTLIER_ERROR
        )
        gradient = (
            slope.T @ (weight * residual) + (places - origin) * PRIOR_ERROR**2 / OUTLIER_ERROR
        )
        before = _cost(residual, places - origin)
        for _ in range(10):
            ahead = _step(matrix, gradient, places, damping)
            found = errors(ahead)
            after = _cost(found, ahead - origin)
            if after < before:
                break
            damping *= 4
        else:
            return places
        places, residual, damping = ahead, found, max(damping / 5, 1e-9)
        if before - after < 1e-4 * before:
            return places
    return places


def _cost(residual: Array, moved: Array) -> float:
    """Returns the objective: the robust sum of errors, and the pull for the distance `moved`."""
    spread = np.sqrt(residual**2 + OUTLIER_ERROR**2).sum()
    return float(spread + 0.5 * (moved**2).sum() * PRIOR_ERROR**2 / OUTLIER_ERROR)


def _slopes(errors: Callable[[Array], Array], places: Array, residual: Array) -> Array:
    """Returns the derivative of every run's error by every position, [runs, parameters]."""
    columns = []
    for index, place in enumerate(places):
        moved = places.copy()
        moved[index] = (
            place + DERIVATIVE_STEP if place + DERIVATIVE_STEP <= 1 else place - DERIVATIVE_STEP
        )
        columns.append((errors(moved) - residual) / (moved[index] - place))
    return np.array(columns).T


def _step(matrix: Array, gradient: Array, places: Array, damping: float) -> Array:
    """Takes a damped Newton step; a parameter that would leave its range stays at the end of it."""
    stuck = ((places <= 0) & (gradient > 0)) | ((places >= 1) & (gradient < 0))
    free = np.flatnonzero(~stuck)
    moved = places.copy()
    if len(free):
        inner = matrix[np.ix_(free, free)]
        damped = inner + damping * np.diag(np.diag(inner))
        moved[free] -= np.clip(np.linalg.solve(damped, gradient[free]), -0.3, 0.3)
    result: Array = np.clip(moved, 0.0, 1.0)
    return result


def held_out_predictions(
    predict: Predict,
    measured: Array,
    parameters: Sequence[FitParameter],
    groups: Sequence[object],
    *,
    start: Calibration | None = None,
) -> Array:
    """Predicts the seconds of every run from constants that were fitted to all other groups of
    runs."""
    predicted = np.zeros(len(measured))
    labels = np.array([str(group) for group in groups])
    for label in dict.fromkeys(labels):
        others = np.flatnonzero(labels != label)
        found = fit_constants(predict, measured, parameters, start=start, runs=others)
        own = np.flatnonzero(labels == label)
        predicted[own] = predict(found, own)
    return predicted


def cross_validation_folds(count: int, most: int = 5) -> list[int]:
    """Assigns each run to a cross-validation fold. Up to 2 * `most` runs each form a fold of their
    own; more are dealt out to `most` folds in turn: 12 runs and `most` 5 give 0, 1, 2, 3, 4, 0, 1,
    2, 3, 4, 0, 1."""
    return list(range(count)) if count <= 2 * most else [index % most for index in range(count)]


def error_bar(predicted: Array, measured: Array) -> ErrorBar:
    """Returns the 10th and 90th percentile of measured / predicted seconds, widened to contain
    1."""
    ratio = measured / predicted
    low, high = np.quantile(ratio, [0.1, 0.9])
    return ErrorBar(low=min(float(low), 1.0), high=max(float(high), 1.0), runs=len(ratio))


def calibrate_constants(
    predict: Predict,
    measured: Array,
    parameters: Sequence[FitParameter],
    *,
    start: Calibration | None = None,
    source: str = "",
) -> Calibration:
    """Fits the constants to all runs, and takes their error bar from runs that were left out of the
    fit."""
    found = fit_constants(predict, measured, parameters, start=start)
    apart = held_out_predictions(
        predict, measured, parameters, cross_validation_folds(len(measured)), start=start
    )
    return replace(found, error=error_bar(apart, measured), source=source)


def values_of(calibration: Calibration, parameters: Sequence[FitParameter]) -> list[float]:
    """Returns the values of parameters in a calibration that sets them: the inverse of
    `with_values`."""
    found = []
    for parameter in parameters:
        of_device = parameter.name in DEVICE_NAMES
        holder = calibration.devices[parameter.types[0]] if of_device else calibration.system
        found.append(float(getattr(holder, parameter.name)))
    return found


def most_informative(slopes: Array, count: int, known: Array | None = None) -> list[int]:
    """Selects the `count` rows of a table of sensitivities [runs, constants] that together
    determine the constants best, beside the rows `known` of runs that were measured already.

    Each row in turn is the one that enlarges det(1 + S^T S) most: a greedy D-optimal design. It is
    also the one whose own step is the least certain, given the rows so far."""
    information = np.eye(slopes.shape[1]) * 1e-4
    if known is not None:
        information += known.T @ known
    chosen: list[int] = []
    for _ in range(min(count, len(slopes))):
        gain = np.einsum("ij,jk,ik->i", slopes, np.linalg.inv(information), slopes)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        information += np.outer(slopes[best], slopes[best])
    return chosen

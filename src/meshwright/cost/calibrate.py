"""Fits the constants of the cost model to measured step times, and says how sure it is.

Few numbers, each inside its plausible range, and a mild pull towards what was believed before: a
constant of which the measurements say nothing stays where it was.
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
"""Seconds of the runs with these indices under these constants."""

SOFT = 0.05
"""Relative error above which a run counts by its size, not its square: runs that went wrong for
reasons of their own do not bend the fit."""
PULL = 0.05
"""Relative error for which the fit will not move a constant from one end of its range to the
other."""
STEP = 1e-3
"""Of a constant's range, for the derivatives."""
ROUNDS = 15


@record
class Knob:
    """One number to fit: a constant of some device types together, or of the system."""

    name: str
    types: tuple[str, ...] = ()
    """Empty for a constant of the system."""
    start: float | None = None
    """None: the middle of the range."""
    low: float = field(default=-1.0)
    high: float = field(default=-1.0)
    """Negative: the plausible range of CONSTANTS."""


def _range(knob: Knob) -> tuple[float, float]:
    known = CONSTANTS[knob.name]
    return (
        known.low if knob.low < 0 else knob.low,
        known.high if knob.high < 0 else knob.high,
    )


def value_at(knob: Knob, place: float) -> float:
    """The value at `place` in [0, 1] of a range: geometric, or linear from zero."""
    low, high = _range(knob)
    if low > 0:
        return float(low * (high / low) ** place)
    return float(low + (high - low) * place)


def place_of(knob: Knob, value: float) -> float:
    """Where in its range a value lies, in [0, 1]; beyond an end: that end."""
    low, high = _range(knob)
    inside = min(max(value, low), high)
    if low > 0:
        return float(np.log(inside / low) / np.log(high / low))
    return (inside - low) / (high - low)


def with_values(start: Calibration, knobs: Sequence[Knob], values: Sequence[float]) -> Calibration:
    """The calibration with these knobs set."""
    devices, system = dict(start.devices), start.system
    for knob, value in zip(knobs, values, strict=True):
        if knob.name not in DEVICE_NAMES:
            system = replace(system, **{knob.name: value})
        for kind in knob.types:
            before = devices.get(kind, DeviceConstants())
            devices[kind] = replace(before, **{knob.name: value})
    return replace(start, devices=devices, system=system)


def fit(
    predict: Predict,
    measured: Array,
    knobs: Sequence[Knob],
    *,
    start: Calibration | None = None,
    runs: NDArray[np.int64] | None = None,
) -> Calibration:
    """The constants that bring predictions closest to measured seconds.

    Minimises the sum of sqrt(e^2 + SOFT^2) over relative errors e, and the pull, by reweighted
    least squares: damped Gauss-Newton steps with numerical derivatives, every knob kept inside its
    range. `runs`: indices of the runs to fit; all by default.
    """
    base = start or Calibration()
    chosen = np.arange(len(measured)) if runs is None else runs

    def values(places: Array) -> list[float]:
        return [value_at(knob, place) for knob, place in zip(knobs, places, strict=True)]

    def errors(places: Array) -> Array:
        found = predict(with_values(base, knobs, values(places)), chosen)
        return found / measured[chosen] - 1

    origin = np.array([0.5 if k.start is None else place_of(k, k.start) for k in knobs])
    places = _descend(errors, origin)
    return with_values(base, knobs, values(places))


def _descend(errors: Callable[[Array], Array], origin: Array) -> Array:
    places, damping = origin.copy(), 1e-2
    residual = errors(places)
    for _ in range(ROUNDS):
        slope = _slopes(errors, places, residual)
        weight = 1 / np.sqrt(residual**2 + SOFT**2)
        matrix = slope.T @ (slope * weight[:, None]) + np.eye(len(places)) * PULL**2 / SOFT
        gradient = slope.T @ (weight * residual) + (places - origin) * PULL**2 / SOFT
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
    spread = np.sqrt(residual**2 + SOFT**2).sum()
    return float(spread + 0.5 * (moved**2).sum() * PULL**2 / SOFT)


def _slopes(errors: Callable[[Array], Array], places: Array, residual: Array) -> Array:
    columns = []
    for index, place in enumerate(places):
        moved = places.copy()
        moved[index] = place + STEP if place + STEP <= 1 else place - STEP
        columns.append((errors(moved) - residual) / (moved[index] - place))
    return np.array(columns).T


def _step(matrix: Array, gradient: Array, places: Array, damping: float) -> Array:
    """A damped Newton step; knobs at an end of their range that want to leave it stay."""
    stuck = ((places <= 0) & (gradient > 0)) | ((places >= 1) & (gradient < 0))
    free = np.flatnonzero(~stuck)
    moved = places.copy()
    if len(free):
        inner = matrix[np.ix_(free, free)]
        damped = inner + damping * np.diag(np.diag(inner))
        moved[free] -= np.clip(np.linalg.solve(damped, gradient[free]), -0.3, 0.3)
    result: Array = np.clip(moved, 0.0, 1.0)
    return result


def held_out(
    predict: Predict,
    measured: Array,
    knobs: Sequence[Knob],
    groups: Sequence[object],
    *,
    start: Calibration | None = None,
) -> Array:
    """Seconds of every run, predicted from constants fitted to all other groups."""
    predicted = np.zeros(len(measured))
    labels = np.array([str(group) for group in groups])
    for label in dict.fromkeys(labels):
        others = np.flatnonzero(labels != label)
        found = fit(predict, measured, knobs, start=start, runs=others)
        own = np.flatnonzero(labels == label)
        predicted[own] = predict(found, own)
    return predicted


def folds(count: int, most: int = 5) -> list[int]:
    """A group for every run: each its own where there are few, else `most` groups, in turn."""
    return list(range(count)) if count <= 2 * most else [index % most for index in range(count)]


def error_bar(predicted: Array, measured: Array) -> ErrorBar:
    """Tenth and ninetieth percentile of measured over predicted seconds, 1 always between them."""
    ratio = measured / predicted
    low, high = np.quantile(ratio, [0.1, 0.9])
    return ErrorBar(low=min(float(low), 1.0), high=max(float(high), 1.0), runs=len(ratio))


def calibrate(
    predict: Predict,
    measured: Array,
    knobs: Sequence[Knob],
    *,
    start: Calibration | None = None,
    source: str = "",
) -> Calibration:
    """Constants fitted to all runs, with the error bar of predictions of runs left out."""
    found = fit(predict, measured, knobs, start=start)
    apart = held_out(predict, measured, knobs, folds(len(measured)), start=start)
    return replace(found, error=error_bar(apart, measured), source=source)


def informative(slopes: Array, count: int) -> list[int]:
    """Rows of a table of sensitivities [runs, constants] that together say most: one after the
    other, each the one that most enlarges det(1 + S^T S) (a D-optimal design, greedily)."""
    information = np.eye(slopes.shape[1]) * 1e-4
    chosen: list[int] = []
    for _ in range(min(count, len(slopes))):
        gain = np.einsum("ij,jk,ik->i", slopes, np.linalg.inv(information), slopes)
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        information += np.outer(slopes[best], slopes[best])
    return chosen

"""Calibration recovers constants that are known, and stays inside what is plausible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.cost.constants import (
    CONSTANTS,
    Calibration,
    DeviceConstants,
    SystemConstants,
    implausible,
)
from meshwright.cost.fit_constants import (
    OUTLIER_ERROR,
    FitParameter,
    calibrate_constants,
    cross_validation_folds,
    error_bar,
    fit_constants,
    fit_position,
    fit_value,
    held_out_predictions,
    with_values,
)
from soaks import portion

RANDOM = np.random.default_rng(7)
WORK = RANDOM.uniform(0.1, 1.0, (24, 3))
"""Of 24 runs: seconds of products at full peak, of memory at full bandwidth, and ring steps."""
KNOBS = (
    FitParameter(name="matmul_efficiency", types=("a", "b"), start=0.5),
    FitParameter(name="memory_efficiency", types=("a",), start=0.8),
    FitParameter(name="ring_step", start=1e-5),
)
TRUE = with_values(Calibration(), KNOBS, (0.7, 0.5, 1e-4))


def seconds(constants: Calibration, runs: NDArray[np.int64]) -> NDArray[np.float64]:
    own = constants.devices["a"]
    assert own.matmul_efficiency
    assert own.memory_efficiency
    products, memory, steps = WORK[runs].T
    found: NDArray[np.float64] = products / own.matmul_efficiency + memory / own.memory_efficiency
    return found + 1e4 * steps * constants.system.ring_step


MEASURED = seconds(TRUE, np.arange(24))


def test_known_constants_are_recovered() -> None:
    found = fit_constants(seconds, MEASURED, KNOBS)
    assert found.devices["a"].matmul_efficiency == pytest.approx(0.7, rel=0.02)
    assert found.devices["a"].memory_efficiency == pytest.approx(0.5, rel=0.02)
    assert found.system.ring_step == pytest.approx(1e-4, rel=0.05)
    assert found.devices["b"].matmul_efficiency == found.devices["a"].matmul_efficiency
    assert found.devices["b"].memory_efficiency is None


def test_a_few_wild_runs_do_not_bend_the_fit() -> None:
    wild = MEASURED.copy()
    wild[[3, 11]] *= 3.0
    found = fit_constants(seconds, wild, KNOBS)
    assert found.devices["a"].matmul_efficiency == pytest.approx(0.7, rel=0.1)


def test_what_the_runs_say_nothing_of_stays_where_it_was() -> None:
    silent = FitParameter(name="boundary", start=3e-4)
    found = fit_constants(seconds, MEASURED, (*KNOBS, silent))
    assert found.system.boundary == pytest.approx(3e-4)


def test_a_whole_range_weighs_as_much_as_an_error_of_a_twentieth() -> None:
    """A constant changes the step by 5 % over its range, and 10 % are missing: the least of error
    and pull together, by looking at a thousand values."""
    weak = FitParameter(name="ring_step", start=0.0, low=0.0, high=1.0)

    def slightly_longer(constants: Calibration, runs: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.ones(len(runs)) + 0.05 * constants.system.ring_step

    found = fit_constants(slightly_longer, np.array([1.1]), (weak,))
    places = np.linspace(0, 1, 1001)
    errors = (1 + 0.05 * places) / 1.1 - 1
    objective = np.sqrt(errors**2 + OUTLIER_ERROR**2) + places**2 / 2 * 0.05**2 / OUTLIER_ERROR
    assert found.system.ring_step == pytest.approx(places[objective.argmin()], rel=0.02)


def test_other_constants_of_the_start_are_kept() -> None:
    start = Calibration(
        devices={"a": DeviceConstants(launch_forward=1e-3)},
        system=SystemConstants(gradient_width=0.5),
    )
    found = fit_constants(seconds, MEASURED, KNOBS, start=start)
    assert found.devices["a"].launch_forward == 1e-3
    assert found.system.gradient_width == 0.5


@settings(max_examples=portion(15), deadline=None)
@given(factor=st.floats(0.01, 100.0))
def test_no_measurement_pushes_a_constant_out_of_its_range(factor: float) -> None:
    found = fit_constants(seconds, MEASURED * factor, KNOBS)
    assert not list(implausible(found, "fit"))


@given(st.sampled_from(sorted(CONSTANTS)), st.floats(0.0, 1.0))
def test_places_and_values_are_inverse_and_monotone(name: str, place: float) -> None:
    knob = FitParameter(name=name)
    value = fit_value(knob, place)
    assert CONSTANTS[name].low <= value * (1 + 1e-12)
    assert fit_position(knob, value) == pytest.approx(place, abs=1e-9)
    assert fit_value(knob, min(place + 0.1, 1.0)) >= value


def test_runs_left_out_are_predicted_from_the_others() -> None:
    noisy = MEASURED * RANDOM.uniform(0.97, 1.03, 24)
    apart = held_out_predictions(seconds, noisy, KNOBS, cross_validation_folds(24))
    assert np.abs(apart / noisy - 1).mean() < 0.03
    assert cross_validation_folds(4) == [0, 1, 2, 3]
    assert cross_validation_folds(10) == list(range(10))
    assert cross_validation_folds(12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert sorted(set(cross_validation_folds(24))) == [0, 1, 2, 3, 4]


def test_the_error_bar_holds_four_fifths_of_the_runs() -> None:
    noisy = MEASURED * RANDOM.uniform(0.9, 1.1, 24)
    found = calibrate_constants(seconds, noisy, KNOBS, source="test")
    assert found.error is not None
    assert found.error.low < 1 < found.error.high
    assert found.error.low > 0.85
    assert found.error.high < 1.15
    assert found.error.runs == 24
    exact = error_bar(MEASURED, MEASURED)
    assert (exact.low, exact.high) == (1.0, 1.0)

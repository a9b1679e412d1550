"""Frequencies of rotary embeddings, scaled for longer sequences: worked out by hand."""

from __future__ import annotations

import math

import pytest

from meshwright.model.transformer.rotary import frequencies
from meshwright.model.transformer.spec import Rotary, Scaling


def test_pairs_turn_ever_slower() -> None:
    """A power of the base for each pair: 100 to the power of 0 and -1/2."""
    assert frequencies(Rotary(base=100.0, features=4), 10) == ([1.0, 0.1], 1.0)


def test_linear_scaling_slows_every_pair() -> None:
    scaling = Scaling(kind="linear", factor=4.0, magnitude=1.5)
    found = frequencies(Rotary(base=100.0, features=4, scaling=scaling), 10)
    assert found == ([0.25, 0.025], 1.5)


def test_llama_3_slows_long_waves_and_some_of_those_between() -> None:
    """Waves of 2 pi, 500 and about 40,000 tokens; below 250 they stay, above 1000 they are slowed.
    Between, at 500, a third of the pair's frequency stays: (1000 / 500 - 1) / (4 - 1)."""
    base = (500 / (2 * math.pi)) ** 3
    scaling = Scaling(kind="llama3", factor=8.0, original=1000, low=1.0, high=4.0)
    found, _ = frequencies(Rotary(base=base, features=6, scaling=scaling), 10)
    middle = 2 * math.pi / 500
    assert found == pytest.approx([1.0, middle * (2 / 3 / 8 + 1 / 3), middle**2 / 8])


def test_yarn_keeps_pairs_that_turn_often_and_slows_those_that_turn_seldom() -> None:
    """Within the original length pair k turns 10^(3 - k) times. From 100 turns on it is kept, up
    to one turn it is slowed to a quarter, and the pair between is half-way."""
    turns = {"original": round(2000 * math.pi), "low": 1.0, "high": 100.0}
    ramp = Scaling(kind="yarn", factor=4.0, truncated=False, **turns)
    found, _ = frequencies(Rotary(base=1e4, features=8, scaling=ramp), 10)
    assert found == pytest.approx([1.0, 0.1, 0.01 * (0.5 + 0.5 / 4), 0.001 / 4], rel=1e-4)
    # Of 50 and 2 turns are pairs 1.3 and 2.7: the ramp then begins at pair 1 and ends at pair 3.
    rounded = Scaling(kind="yarn", factor=4.0, **{**turns, "low": 2.0, "high": 50.0})
    assert frequencies(Rotary(base=1e4, features=8, scaling=rounded), 10)[0] == pytest.approx(
        found, rel=1e-4
    )


def test_longrope_has_divisors_for_short_and_for_long_sequences() -> None:
    scaling = Scaling(kind="longrope", original=10, short=(1.0, 2.0), long=(4.0, 5.0))
    rotary = Rotary(base=100.0, features=4, scaling=scaling)
    assert frequencies(rotary, 10)[0] == pytest.approx([1.0, 0.05])
    assert frequencies(rotary, 11)[0] == pytest.approx([0.25, 0.02])

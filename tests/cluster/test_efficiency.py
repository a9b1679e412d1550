"""The shares of their peaks that devices reach, estimated from their datasheets."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.efficiency import (
    ARCHITECTURES,
    JOULES_PER_BYTE,
    SHARED,
    reached_shares,
    with_reached_shares,
)
from meshwright.cluster.spec import DeviceType

CARD = DeviceType(
    name="card",
    memory=2**34,
    memory_bandwidth=5e11,
    peak={"fp32": 3e13, "fp16": 1.2e14, "bf16": 1.2e14},
)


def test_a_card_at_its_power_limit_reaches_what_the_law_says():
    """T4 by hand: 70 W less 19.2 W for memory, 2.2 pJ a FLOP, 65 TFLOP/s."""
    t4 = replace(CARD, memory_bandwidth=3.2e11, peak={"fp16": 6.5e13, "fp32": 8.1e12})
    found = reached_shares(ARCHITECTURES["turing"], t4, 70.0)
    bound = (70 - 19.2) / 2.2e-12 / 6.5e13 / 0.95
    assert found["fp16"].forward == pytest.approx(0.95 * bound**SHARED.forward_exponent)
    assert found["fp16"].backward == pytest.approx(0.95 * bound**SHARED.backward_exponent)
    assert found["fp16"].backward < found["fp16"].forward


def test_power_that_does_not_bind_changes_nothing():
    chip = ARCHITECTURES["ada"]
    assert reached_shares(chip, CARD, 1e4) == reached_shares(chip, CARD, 1e6)
    assert reached_shares(chip, CARD, 1e4)["bf16"].forward == chip.tensor_most


@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.floats(10, 2000),
    st.floats(1, 2),
    st.floats(1e10, 1e13),
)
def test_more_power_is_never_slower(name, watts, more, bandwidth):
    card = replace(CARD, memory_bandwidth=bandwidth)
    low = reached_shares(ARCHITECTURES[name], card, watts)
    high = reached_shares(ARCHITECTURES[name], card, watts * more)
    for precision in card.peak:
        assert 0 < low[precision].forward <= high[precision].forward <= 1
        assert 0 < low[precision].backward <= high[precision].backward <= 1


def test_what_is_stated_stays_and_the_rest_is_estimated():
    chip = ARCHITECTURES["ada"]
    card = replace(CARD, matmul_efficiency=0.4, attention_efficiency=0.2)
    kept = with_reached_shares(card, chip, 100.0, {"matmul_efficiency": 0.4})
    assert kept.matmul_efficiency == 0.4
    assert set(kept.matmul_shares or {}) == {"fp32"}
    assert kept.attention_efficiency == pytest.approx(0.4 * chip.attention)
    new = with_reached_shares(card, chip, 100.0, {})
    assert new.matmul_shares is not None
    own = new.matmul_shares["fp16"]
    assert new.matmul_efficiency == pytest.approx(
        3 / (1 / own.forward + 2 / own.backward), abs=1e-3
    )


def test_every_architecture_has_a_memory_that_is_known():
    assert {chip.memory for chip in ARCHITECTURES.values()} == set(JOULES_PER_BYTE)

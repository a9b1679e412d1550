"""Ranks, regret, rivals and versions: the figures beside predicted and measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from beds import JOB, mixed_cluster, pipeline_plan
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.profile import LayerTime, Profile, version_mismatches, versions
from meshwright.model.load import load_model
from meshwright.workflows.session import Session
from meshwright.workflows.verify import Verification, Verified, spearman, unmeasured

NUMBERS = st.lists(st.integers(1, 1000), min_size=3, max_size=20, unique=True)


def _strategy(name: str, predicted: float, measured: float) -> Verified:
    return Verified(
        name=name,
        plan="",
        predicted_seconds=predicted,
        measured_seconds=measured,
        spread=0.0,
        foreign_share=0.0,
        disturbed=False,
    )


@given(NUMBERS)
def test_any_order_preserving_change_keeps_the_ranks(values: list[int]) -> None:
    assert spearman(values, [value**3 + 1 for value in values]) == pytest.approx(1.0)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1.0)


def test_ties_share_their_rank() -> None:
    # By hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_too_few_strategies_have_no_correlation() -> None:
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_regret_is_what_the_plan_loses_to_the_best_tried() -> None:
    found = Verification(
        strategies=(_strategy("plan", 1.0, 1.1), _strategy("dp", 2.0, 1.0), _strategy("amp", 3, 3))
    )
    assert found.regret == pytest.approx(0.1)
    assert found.strategies[0].error == pytest.approx(-1 / 11)
    assert found.rank_correlation == pytest.approx(0.5)


def test_a_profile_from_elsewhere_is_told_apart() -> None:
    own = Profile(model="m", sequence=1, versions=versions())
    assert version_mismatches(own) == ()
    other = replace(own, versions=versions() | {"torch": "1.0", "machine": "an abacus"})
    said = version_mismatches(other)
    assert len(said) == 2
    assert any("an abacus" in sentence for sentence in said)


def test_what_a_profile_lacks_is_said() -> None:
    model = load_model("gpt-tiny", 16, "fp32")
    signature = model.layers[1].signature
    times = tuple(
        LayerTime(
            device="fast",
            signature=signature,
            precision="fp32",
            tensor=1,
            rows=rows,
            forward_seconds=1.0,
            backward_seconds=2.0,
        )
        for rows in (1, 4)
    )
    cluster = mixed_cluster()
    session = Session(
        model=model,
        cluster=cluster,
        job=JOB,
        profile=Profile(model="gpt-tiny", sequence=16, layers=times),
        model_source="gpt-tiny",
        cluster_source="",
        profile_source="",
        warnings=(),
    )
    said = unmeasured(session, pipeline_plan((((("a:0",),)), (("b:0",),)), (0, 5, 10)))
    assert "2 rows on fast: interpolated from 1, 4" in said
    assert "slow was not measured: its layers are priced by the datasheet" in said

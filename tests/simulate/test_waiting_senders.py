"""Senders that wait for their messages: two stages by hand, and laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.constants import Calibration
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.search.candidate import candidate_of
from meshwright.search.candidate_estimate import pipeline_prices
from meshwright.search.costs import costs_of
from meshwright.search.pipeline_seconds import LEVEL, pipeline_seconds
from meshwright.simulate.critical_path import PARTS, step_breakdown
from meshwright.simulate.simulator import simulate_plan
from plain_constants import PLAIN_DEVICE, PLAIN_SYSTEM, plain
from strategies import models_and_plans
from worlds import even_model, even_plan, one_node

CROSSING = 0.5


def waiting(exposure: float, instruction: float = 0.0) -> Profile:
    system = replace(PLAIN_SYSTEM, send_exposure=exposure, instruction=instruction)
    return plain(calibration=Calibration(others=PLAIN_DEVICE, system=system))


MODEL = even_model(2, seconds=1.0, cut_bytes=1000 * CROSSING)
"""Stages of 1 s forward and 2 s backward; a message takes half a second."""
CLUSTER = one_node(2, bandwidth=1000.0)


def two_stages(micro_batches: int, schedule: str = "1f1b") -> Plan:
    return even_plan(MODEL, CLUSTER, stages=2, micro_batches=micro_batches, schedule=schedule)


def played(plan: Plan, exposure: float) -> Timeline:
    return simulate_plan(plan, MODEL, CLUSTER, waiting(exposure))


NORM = 2 * 16 / 1000 / 2
"""Seconds of the sum of the norms: 16 bytes around a ring of two."""


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 9])
def test_a_stage_of_two_takes_its_work_and_its_messages(micro_batches: int) -> None:
    """The first micro-batch goes there and back; each further one takes either stage a forward, a
    backward and one message that it sends: F0 x F1 x B0 F2 x ... on the first."""
    step = played(two_stages(micro_batches), 1.0).step_seconds
    first, further = 6 + 2 * CROSSING, 3 + CROSSING
    assert step == pytest.approx(first + (micro_batches - 1) * further + NORM)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 9])
def test_the_closed_form_says_the_same(micro_batches: int) -> None:
    """But for the weight of the stage that is done sooner: the first one's last backward is over
    while the second has sent all."""
    plan = two_stages(micro_batches)
    costs = costs_of(MODEL, CLUSTER, plan.job, waiting(1.0))
    prices = pipeline_prices(costs, candidate_of(plan.pipelines[0]))
    found = pipeline_seconds(prices, micro_batches, "1f1b")
    first, further = 6 + 2 * CROSSING, 3 + CROSSING
    exact = first + (micro_batches - 1) * further
    assert exact * (1 - LEVEL) < found <= exact * (1 + 1e-9)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 9])
def test_so_it_does_of_gpipe(micro_batches: int) -> None:
    """All forwards of the second stage follow the first one's pace, all backwards the second's."""
    plan = two_stages(micro_batches, "gpipe")
    costs = costs_of(MODEL, CLUSTER, plan.job, waiting(1.0))
    prices = pipeline_prices(costs, candidate_of(plan.pipelines[0]))
    exact = 6 + 2 * CROSSING + (micro_batches - 1) * (3 + 2 * CROSSING)
    assert played(plan, 1.0).step_seconds == pytest.approx(exact + NORM)
    assert pipeline_seconds(prices, micro_batches, "gpipe") == pytest.approx(exact)


def test_senders_that_do_not_wait_hide_their_messages() -> None:
    """The second stage works on from the first arrival until the last gradient leaves."""
    step = played(two_stages(2), 0.0).step_seconds
    assert step == pytest.approx(6 + 2 * CROSSING + 3 + NORM)


def test_the_wait_of_a_sender_is_time_of_transfers() -> None:
    """On the second stage: F0 B0 x F1 B1, between two messages of the first micro-batch and the
    last."""
    seconds = step_breakdown(played(two_stages(2), 1.0))
    assert seconds["transfers"] == pytest.approx(3 * CROSSING)
    assert step_breakdown(played(two_stages(2), 0.0))["transfers"] == pytest.approx(2 * CROSSING)


@given(models_and_plans(), st.sampled_from([1e5, 1e6, 1e9]))
def test_the_parts_of_a_step_still_add_up(case: tuple[LayerGraph, Plan], bandwidth: float) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices), bandwidth=bandwidth)
    timeline = simulate_plan(plan, model, cluster, waiting(1.0))
    seconds = step_breakdown(timeline)
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == pytest.approx(timeline.step_seconds, rel=1e-9)
    assert all(value >= 0 for value in seconds.values())


@given(
    stages=st.integers(1, 5),
    micro_batches=st.integers(1, 7),
    schedule=st.sampled_from(["1f1b", "gpipe", "eager-1f1b", "zb-h1"]),
    latency=st.sampled_from([1e-5, 3e-4, 2e-3]),
    exposures=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    instructions=st.tuples(st.floats(0, 1e-2), st.floats(0, 1e-2)).map(sorted),
)
def test_waits_and_host_time_never_make_a_step_shorter(
    stages: int,
    micro_batches: int,
    schedule: str,
    latency: float,
    exposures: list[float],
    instructions: list[float],
) -> None:
    """Messages of latency alone, which do not slow each other down."""
    model = even_model(2 * stages)
    cluster = one_node(stages, bandwidth=1e18, latency=latency)
    plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches, schedule=schedule)

    def step(exposure: float, instruction: float) -> float:
        return simulate_plan(plan, model, cluster, waiting(exposure, instruction)).step_seconds

    (less, more), (quick, slow) = exposures, instructions
    steps = [step(less, quick), step(more, quick), step(more, slow)]
    assert steps[0] <= steps[1] * (1 + 1e-12)
    assert steps[1] <= steps[2] * (1 + 1e-12)
    each = 2 * micro_batches * (slow - quick)
    assert steps[2] >= steps[1] + each * (1 - 1e-9)

"""How far ahead receives are posted: what a transfer may hide behind."""

from dataclasses import replace

import pytest

from meshwright.plan.spec import ScheduleName
from meshwright.simulate.simulator import simulate_plan
from plain_constants import PLAINLY
from worlds import even_model, even_plan, one_node


def further(schedule: ScheduleName, crossing: float, stages: int) -> float:
    """Seconds of one micro-batch more, with forwards of 1 s and backwards of 2 s."""
    cluster = one_node(stages, bandwidth=1000.0)
    model = even_model(stages, seconds=1.0, cut_bytes=1000 * crossing)

    def step(micro_batches: int) -> float:
        plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches)
        plan = replace(plan, schedule=schedule)
        return simulate_plan(plan, model, cluster, PLAINLY).step_seconds

    return (step(40) - step(16)) / 24


@pytest.mark.parametrize("crossing", [0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize(("schedule", "held"), [("1f1b", 2), ("eager-1f1b", 3), ("zb-h2", 3)])
def test_two_stages_wait_for_nothing_but_the_round_trips_of_what_they_hold(
    schedule, held, crossing
):
    """A micro-batch takes 6 s of computing and two transfers; the first stage holds `held`."""
    trips = (6 + 2 * crossing) / held
    assert further(schedule, crossing, 2) == pytest.approx(max(3.0, trips), rel=0.02)


@pytest.mark.parametrize("stages", [3, 4, 6])
def test_eager_hides_transfers_as_long_as_a_forward_whatever_the_depth(stages):
    assert further("eager-1f1b", 0.9, stages) == pytest.approx(3.0)
    assert further("1f1b", 0.9, stages) > 4.0

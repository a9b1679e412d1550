"""Communication that computation stops for, and none at all: by hand for two stages."""

import pytest
from test_resharding import load

from plain_constants import PLAINLY
from worlds import even_model, even_plan, one_node

methods = load("overlap_methods")


def steps(crossing: float, micro_batches: int, stages: int = 2) -> dict[str, float]:
    """Seconds by every way: a forward takes 1 s, a backward 2 s, a transfer `crossing`."""
    cluster = one_node(stages, bandwidth=1000.0)
    model = even_model(stages, seconds=1.0, cut_bytes=1000 * crossing)
    plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches)
    ways = ("free", "posted", "blocking")
    return {way: methods.step_seconds(plan, model, cluster, way, PLAINLY) for way in ways}


@pytest.mark.parametrize("crossing", [1.0, 4.0])
def test_two_stages_that_stop_for_every_transfer(crossing):
    alone, two = steps(crossing, 1), steps(crossing, 2)
    assert alone["free"] == pytest.approx(6, abs=0.1)
    assert alone["blocking"] - alone["free"] == pytest.approx(2 * crossing)
    assert alone["posted"] == pytest.approx(alone["blocking"])
    # F0 | x F1 | x x B0 | x B1 on the first stage, where x is a transfer.
    assert two["free"] - alone["free"] == pytest.approx(3)
    assert two["blocking"] - two["free"] == pytest.approx(4 * crossing)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("crossing", [0.5, 2.0])
def test_posting_ahead_is_never_slower_than_stopping(stages, crossing):
    found = steps(crossing, 6, stages)
    assert found["free"] < found["posted"] < found["blocking"]

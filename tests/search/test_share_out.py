"""The batch is shared out among pipelines near their speeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Link
from meshwright.search import plan_estimate, template_search
from meshwright.search.costs import costs_of
from meshwright.search.device_classes import PipelineTemplate, StageRun, device_classes
from meshwright.search.pipeline_seconds import pipeline_seconds
from meshwright.search.plan_estimate import whole_seconds
from meshwright.search.share_out import NEAR, TRIED, counts_near
from meshwright.search.template_estimate import estimate_template
from worlds import cluster, device, job, model

NETWORK = Link(bandwidth=1e10, latency=1e-5)


def three_pipelines(batch):
    """One pipeline on each of three kinds of devices of unequal speeds."""
    kinds = ("fast", "slow", "slower")
    types = tuple(device(kind, 30.0 / (i + 1)) for i, kind in enumerate(kinds))
    where = cluster(*((kind,) for kind in kinds), network=NETWORK, types=types, names=kinds)
    costs = costs_of(model([10.0] * 2), where, job(batch))
    context = template_search.estimate_context(costs, device_classes(costs), "best")
    templates = [PipelineTemplate((StageRun(i, 1, 1, 1, 1),), 1) for i in range(3)]
    return context, tuple(estimate_template(context, each, batch // 3) for each in templates)


def test_shares_of_several_pipelines_are_timed_by_pace_not_by_combination(monkeypatch):
    """More than a hundred combinations of numbers of micro-batches: each pipeline is timed with two
    numbers, which tell its pace, and with the one that it gets."""
    context, chosen = three_pipelines(120)
    asked = []

    def timed(prices, count, order):
        asked.append(count)
        return pipeline_seconds(prices, count, order)

    monkeypatch.setattr(plan_estimate, "pipeline_seconds", timed)
    best = template_search._shared_out(context, chosen, 120)
    assert sum(best.counts) == 120
    assert best.counts[0] > best.counts[1] > best.counts[2]
    tried = len(asked)
    assert best.seconds == whole_seconds(context, chosen, best.counts)
    combinations_tried = len(list(counts_near((3.0, 2.0, 1.0), (1, 1, 1), 120)))
    assert combinations_tried > 100
    assert tried == 9


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=5, max_size=5),
    st.integers(1, 400),
)
def test_numbers_of_micro_batches_add_up_to_the_batch_and_are_near_the_speeds(speeds, rows, batch):
    rows = rows[: len(speeds)]
    found = list(counts_near(speeds, rows, batch))
    assert len(found) == len(set(found)) <= max(2 * TRIED, 2 * NEAR + 1)
    for counts in found:
        assert min(counts) >= 1
        assert sum(c * each for c, each in zip(counts, rows, strict=True)) == batch
        for count, speed, each in list(zip(counts, speeds, rows, strict=True))[:-1]:
            ideal = batch * speed / sum(speeds) / each
            assert abs(count - max(1.0, ideal)) <= NEAR + 0.5


def test_a_pace_tells_what_many_micro_batches_take():
    context, chosen = three_pipelines(120)
    for each in chosen:
        fill, speed = plan_estimate.pace(context, each)
        for count in (17, 49, 1000):
            assert fill + count / speed == pytest.approx(
                pipeline_seconds(each.prices, count, "best"), rel=1e-6
            )


def test_pipelines_that_end_together_take_the_least_that_any_share_takes():
    context, chosen = three_pipelines(120)
    least = plan_estimate.least_seconds(context, chosen)
    best = template_search._shared_out(context, chosen, 120)
    assert least <= best.seconds < 1.1 * least
    for counts in counts_near((3.0, 2.0, 1.0), (1, 1, 1), 120):
        assert least <= whole_seconds(context, chosen, counts)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(4, 50))
def test_equal_pipelines_may_get_equal_numbers(number, rows, each):
    found = set(counts_near((1.0,) * number, (rows,) * number, number * rows * each))
    assert (each,) * number in found

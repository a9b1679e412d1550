"""Every move yields whole strategies: all layers, all rows, no device twice, another strategy."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.search import neighbourhood
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import costs_of
from meshwright.search.hill_climb import MOVES
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.stage_devices import StageDevices
from soaks import portion
from worlds import cluster, job, model

INFINITE = float("inf")
WHERE = cluster(("fast", "fast"), ("slow", "slow"), ("fast", "slow"))


def priced(batch=12):
    return costs_of(model([10.0, 5.0, 40.0, 10.0, 10.0, 20.0, 5.0]), WHERE, job(batch))


def line(costs, *stages, rows=4, count=3):
    return fit_pipeline(costs, tuple(stages), rows, count, "1f1b").pipeline


def unit(name):
    return tuple(name.split())


@st.composite
def strategies(draw):
    costs = priced()
    names = draw(st.permutations(["a:0", "a:1", "b:0", "b:1", "c:0", "c:1"]))[
        : draw(st.integers(2, 6))
    ]
    ends = sorted({len(names), *draw(st.sets(st.integers(1, len(names) - 1)))})
    stages = [tuple((name,) for name in names[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    two = len(stages) > 1 and draw(st.booleans())
    parts = [stages[:1], stages[1:]] if two else [stages]
    rows = 6 if two else 12
    return costs, ("1f1b", tuple(line(costs, *part, rows=rows, count=1) for part in parts))


@settings(max_examples=portion(40))
@given(strategies(), st.sampled_from(MOVES))
def test_nothing_is_lost_and_nothing_is_used_twice(drawn, move):
    costs, strategy = drawn
    for schedule, lines in move(costs, strategy, INFINITE):
        assert sum(each.share for each in lines) == costs.job.global_batch
        used = Counter(
            name
            for each in lines
            for stage in each.stages
            for unit in stage.groups
            for name in unit
        )
        assert set(used.values()) == {1}
        for each in lines:
            assert each.bounds[0] == 0
            assert each.bounds[-1] == len(costs.model.layers)
            assert all(a < b for a, b in zip(each.bounds, each.bounds[1:], strict=False))
            assert all(
                min(stage.rows) >= 1 and sum(stage.rows) == each.rows for stage in each.stages
            )
            assert all(len({len(u) for u in stage.groups}) == 1 for stage in each.stages)
        assert schedule in ("1f1b", "gpipe")


@settings(max_examples=portion(20))
@given(strategies(), st.sampled_from(MOVES), st.booleans())
def test_a_limit_leaves_out_only_what_is_slower(drawn, move, any_order):
    """In its own schedule, and in the best order of work."""
    costs, strategy = drawn
    limit = candidate_seconds(costs, strategy[1], "best" if any_order else "1f1b")
    kept = set(move(costs, strategy, limit))
    for schedule, lines in move(costs, strategy, INFINITE):
        if (schedule, lines) not in kept:
            order = "best" if any_order else schedule
            assert candidate_seconds(costs, lines, order) >= limit * (1 - 1e-9)


def shapes(found):
    return {
        tuple(tuple(stage.groups for stage in each.stages) for each in lines) for _, lines in found
    }


A0, A1, B0, B1, C0, C1 = (unit(name) for name in ("a:0", "a:1", "b:0", "b:1", "c:0", "c:1"))


def test_layers_move_over_one_cut_and_over_neighbouring_cuts():
    costs = priced()
    start = CandidatePipeline(
        (StageDevices((A0,), (4,)), StageDevices((B0,), (4,)), StageDevices((C0,), (4,))),
        (0, 2, 4, 7),
        3,
    )
    bounds = {
        lines[0].bounds for _, lines in neighbourhood.layers(costs, ("1f1b", (start,)), INFINITE)
    }
    assert {(0, 3, 4, 7), (0, 1, 4, 7), (0, 2, 6, 7), (0, 3, 5, 7), (0, 1, 3, 7)} <= bounds
    assert (0, 4, 4, 7) not in bounds


def test_rows_move_between_unlike_replicas_only():
    costs = priced()
    start = CandidatePipeline((StageDevices((A0, A1, B0), (5, 5, 2)),), (0, 7), 1)
    found = {
        lines[0].stages[0].rows
        for _, lines in neighbourhood.rows(costs, ("1f1b", (start,)), INFINITE)
    }
    assert {(4, 5, 3), (6, 5, 1)} <= found
    assert (6, 4, 2) not in found


def test_micro_batches_become_one_or_two_sizes_larger_or_smaller():
    """Twelve rows come in micro-batches of 1, 2, 3, 4, 6 or 12."""
    costs = priced()
    start = line(costs, (A0,), (B0,))
    assert start.rows == 4
    found = [
        lines[0] for _, lines in neighbourhood.micro_batches(costs, ("1f1b", (start,)), INFINITE)
    ]
    assert [(each.rows, each.micro_batches) for each in found] == [(2, 6), (3, 4), (6, 2), (12, 1)]


def test_runs_and_stages_change_places():
    costs = priced()
    start = line(costs, (A0,), (A1,), (B0,))
    found = shapes(neighbourhood.order(costs, ("1f1b", (start,)), INFINITE))
    assert (((B0,), (A0,), (A1,)),) in found
    assert (((A0,), (B0,), (A1,)),) in found
    assert (((A0,), (A1,), (B0,)),) not in found


def test_shares_move_by_a_micro_batch_or_a_row():
    costs = priced()
    start = line(costs, (A0, A1), rows=4, count=2), line(costs, (B0,), rows=2, count=2)
    found = {
        tuple(each.share for each in lines)
        for _, lines in neighbourhood.shares(costs, ("1f1b", start), INFINITE)
    }
    assert {(10, 2), (7, 5), (9, 3), (6, 6), (4, 8)} <= found


def test_a_run_is_recast_in_depth_and_tensor_width():
    costs = priced()
    start = line(costs, (A0,), (A1,), (B0,))
    found = shapes(neighbourhood.recast(costs, ("1f1b", (start,)), INFINITE))
    assert (((A0, A1), (B0,)),) in found
    assert (((A0 + A1,), (B0,)),) in found


def test_stages_are_merged_split_and_exchange_units():
    costs = priced()
    start = line(costs, (A0, A1), (B0,), (B1,))
    found = shapes(neighbourhood.stages(costs, ("1f1b", (start,)), INFINITE))
    assert (((A0,), (A1,), (B0,), (B1,)),) in found
    assert (((A0, A1), (B0, B1)),) in found
    assert any((A0, B0) in stages or (B0, A1) in stages for (stages,) in found)


def test_devices_come_into_use_and_go_out_of_it():
    costs = priced()
    start = line(costs, (A0,), (B0,))
    found = shapes(neighbourhood.devices(costs, ("1f1b", (start,)), INFINITE))
    assert (((A0, A1), (B0,)),) in found
    assert (((A0,), (B0,), (B1,)),) in found
    assert (((B0,),),) in found


def test_the_last_device_of_a_line_leaves_its_share_to_the_others():
    costs = priced()
    start = line(costs, (A0, A1), rows=4, count=2), line(costs, (B0,), rows=2, count=2)
    alone = [
        lines
        for _, lines in neighbourhood.devices(costs, ("1f1b", start), INFINITE)
        if len(lines) == 1
    ]
    assert {lines[0].share for lines in alone} == {12}


def test_only_sizes_near_the_wanted_one_are_tried():
    costs = priced()

    def sizes(stages, rows, limit=INFINITE):
        found = neighbourhood.with_share(costs, stages, rows, 12, "1f1b", limit)
        return [each.rows for each in found]

    assert sizes(((A0,), (B0,)), 3) == [3, 2]
    assert sizes(((A0, A1, C0),), 2) == [3, 4]
    assert sizes((), 3) == []
    assert sizes(((A0,),), 3, limit=0.0) == []


@pytest.mark.parametrize("count", [1, 2])
def test_the_schedule_changes_only_where_it_matters(count):
    costs = priced()
    start = line(costs, (A0,), (B0,), rows=12 // count, count=count)
    found = list(neighbourhood.schedules(costs, ("1f1b", (start,)), INFINITE))
    assert found == ([("gpipe", (start,))] if count > 1 else [])


def test_a_slow_device_gives_its_place_to_an_idle_fast_one():
    costs = priced()
    strategy = ("1f1b", (line(costs, (unit("a:0"), unit("b:0")), rows=12, count=1),))
    stages = {
        lines[0].stages[0].groups for _, lines in neighbourhood.exchanged(costs, strategy, INFINITE)
    }
    assert (unit("a:0"), unit("a:1")) in stages
    assert (unit("a:0"), unit("c:0")) in stages
    assert (unit("a:0"), unit("b:1")) not in stages

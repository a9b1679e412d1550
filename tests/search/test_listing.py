"""The list scheduler: legal, within memory, never behind a named schedule, near the optimum."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listings import best_named, random_work

from meshwright.program.actions import parse_order
from meshwright.program.codes import to_codes, to_orders
from meshwright.program.operations import Op
from meshwright.program.orders import check_orders
from meshwright.program.work import Work, fits, play, seconds
from meshwright.search.list_scheduler.greedy import Rule, listed
from meshwright.search.list_scheduler.listing import best_order
from meshwright.search.list_scheduler.refine import refined
from soaks import tenth


def check(work: Work, looked_at: int) -> None:
    codes = best_order(work, looked_at)
    assert codes is not None
    orders = to_orders(codes)
    check_orders(orders, work.layout, work.micro_batches, source="test", where="pipelines[0]")
    assert to_codes(orders) == codes
    assert fits(work, codes)
    assert seconds(work, codes) <= best_named(work)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_an_order_is_legal_fits_and_is_never_behind_a_named_one(seed):
    check(random_work(Random(seed)), 30_000)


@pytest.mark.slow
def test_hundreds_of_pipelines_are_never_behind_a_named_schedule():
    for seed in range(200):
        check(random_work(Random(seed), 6, 12), 100_000)


def test_the_same_work_gives_the_same_order():
    work = random_work(Random(7))
    assert best_order(work, 50_000) == best_order(work, 50_000)


@given(st.integers(0, 10**6))
def test_changing_an_order_never_makes_it_slower(seed):
    work = random_work(Random(seed))
    codes = best_order(work, 1)
    assert codes is not None
    took, better = refined(work, codes, 50)
    assert took == seconds(work, better) <= seconds(work, codes)


def test_no_room_for_a_single_micro_batch_gives_no_order():
    work = random_work(Random(1))
    fields = {name: getattr(work, name) for name in Work.__dataclass_fields__}
    assert best_order(Work(**{**fields, "room": (1.0,) * len(work.room)})) is None


def test_virtual_stages_are_listed_too():
    base = random_work(Random(3), 4, 6)
    stages = len(base.forward)
    fields = {name: getattr(base, name) for name in Work.__dataclass_fields__}
    work = Work(**{**fields, "layout": (tuple(range(stages)),), "room": (1000.0,)})
    codes = best_order(work, 30_000)
    assert codes is not None
    ends = play(work, codes)
    assert ends is not None
    each = sum(work.forward) + sum(work.whole)
    assert ends[0][-1] == pytest.approx(each * work.micro_batches)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pipelines_are_within_three_percent_of_the_optimum():
    pytest.importorskip("ortools", reason="the exact solver is not installed")
    from optimum import least_seconds

    for seed in range(tenth(400)):
        work = random_work(Random(seed))
        codes = best_order(work)
        assert codes is not None
        took = seconds(work, codes)
        least, _ = least_seconds(work, took, 5.0)
        assert took <= 1.03 * least, seed


def test_forwards_go_first_where_that_is_the_rule():
    """Four stages on one device that has room for all: no backward before the last forward."""
    ones = (1.0,) * 4
    work = Work(
        layout=((0, 1, 2, 3),),
        micro_batches=3,
        forward=ones,
        whole=ones,
        inputs=ones,
        weights=ones,
        onward=(0.0,) * 3,
        back=(0.0,) * 3,
        full=ones,
        half=ones,
        room=(100.0,),
    )
    for first in (True, False):
        rule = Rule(ahead=(3,) * 4, lag=(3,) * 4, patience=0.0, forward_first=first, split=0)
        found = listed(work, rule)
        assert found is not None
        (order,) = to_orders(found[1])
        ops = [action.op for action in order]
        assert (ops[:12] == [Op.FORWARD] * 12) == first
        assert found[0] == 24.0, "the device is never idle, and begins at once"


def test_one_micro_batch_at_a_time_becomes_an_order_in_which_both_groups_work():
    """Four of them take 24 seconds one after another; the first group is idle for no more than the
    3 of the second at best: 15, or less if its last gradients of weights come last."""
    work = Work(
        layout=((0,), (1,)),
        micro_batches=4,
        forward=(1.0, 1.0),
        whole=(2.0, 2.0),
        inputs=(1.0, 1.0),
        weights=(1.0, 1.0),
        onward=(0.0,),
        back=(0.0,),
        full=(1.0, 1.0),
        half=(1.0, 1.0),
        room=(100.0, 100.0),
    )
    text = " ".join(f"F{k} B{k}" for k in range(4))
    alone = to_codes(tuple(parse_order(text, (s,), source="t", field="x") for s in (0, 1)))
    assert seconds(work, alone) == 24.0
    took, better = refined(work, alone, 2000)
    assert took == seconds(work, better) <= 15.0


@given(st.integers(0, 10**6), st.floats(0.5, 1.5))
def test_an_order_is_left_off_only_where_it_takes_longer_than_the_limit(seed, share):
    work = random_work(Random(seed))
    every = (work.micro_batches,) * len(work.forward)
    rule = Rule(ahead=every, lag=every, patience=0.5, forward_first=False, split=work.micro_batches)
    whole = listed(work, rule)
    if whole is not None:
        limit = share * whole[0]
        assert listed(work, rule, limit) in ([whole] if share >= 1 else [whole, None])

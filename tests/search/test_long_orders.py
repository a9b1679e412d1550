"""Orders for many micro-batches: rules are compared on few, and the best are followed on all."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listings import random_work

from meshwright.program.codes import to_codes, to_orders
from meshwright.program.orders import check_orders
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Work, fits, seconds
from meshwright.search.list_scheduler import listing
from meshwright.search.list_scheduler.listing import KEPT, NAMES, best_order
from soaks import portion


def even_work(layout, count):
    """Stages that take a second for each part, with room for anything."""
    stages = sum(map(len, layout))
    ones = (1.0,) * stages
    return Work(
        layout=layout,
        micro_batches=count,
        forward=ones,
        whole=(2.0,) * stages,
        inputs=ones,
        weights=ones,
        onward=(0.0,) * (stages - 1),
        back=(0.0,) * (stages - 1),
        full=ones,
        half=ones,
        room=(1000.0,) * len(layout),
    )


@settings(max_examples=portion(40))
@given(st.integers(0, 10**6), st.integers(1, 120))
def test_a_long_order_is_legal_and_fits(seed, count):
    """With an allowance that is too small to place every action of many orders."""
    work = replace(random_work(Random(seed)), micro_batches=count)
    codes = best_order(work, 500)
    assert codes is not None
    orders = to_orders(codes)
    check_orders(orders, work.layout, count, source="test", where="pipelines[0]")
    assert to_codes(orders) == codes
    assert fits(work, codes)


@settings(max_examples=portion(25))
@given(st.integers(0, 10**6))
def test_it_is_not_behind_any_schedule_with_a_rule(seed):
    """The pace of a few micro-batches tells which of them are fast."""
    work = replace(random_work(Random(seed)), micro_batches=100)
    took = seconds(work, best_order(work, 2_000))
    for name in NAMES:
        if name != "zb-v" and "interleaved" not in name:
            other = to_codes(schedule_orders(name, work.layout, 100))
            assert not fits(work, other) or took <= (1 + 1e-9) * seconds(work, other)


@pytest.mark.parametrize("layout", [((0,), (1,), (2,)), ((0, 5), (1, 4), (2, 3))])
def test_few_orders_of_all_micro_batches_are_made(layout, monkeypatch):
    """Whatever their number: what grows with it is the length of these orders alone."""
    made = []
    listed = listing.listed
    monkeypatch.setattr(
        listing, "listed", lambda work, *rest: made.append(work) or listed(work, *rest)
    )
    for count in (200, 1000):
        made.clear()
        assert best_order(even_work(layout, count), 5_000) is not None
        assert sum(work.micro_batches == count for work in made) == KEPT


def test_even_stages_lose_nothing_but_the_filling():
    work = even_work(((0,), (1,), (2,)), 300)
    assert seconds(work, best_order(work, 2_000)) == 3 * 300 + 2

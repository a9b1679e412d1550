"""An order for few micro-batches becomes one for many by more rounds of its steady state."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from listings import random_work

from meshwright.program.orders import check_orders
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import Work, fits, play, seconds, to_codes, to_orders
from meshwright.search.list_scheduler.listing import best_order
from meshwright.search.list_scheduler.steady import LEAST, ROUNDS, lengthened, shortened
from soaks import portion


def long_work(seed, most=120):
    random = Random(seed)
    return replace(random_work(random), micro_batches=random.randint(2, most))


@given(st.integers(0, 10**6))
def test_short_work_has_enough_micro_batches_and_is_the_same_otherwise(seed):
    work = long_work(seed)
    short = shortened(work)
    few = max(LEAST, ROUNDS * len(work.forward))
    assert short.micro_batches == min(few, work.micro_batches)
    assert replace(short, micro_batches=work.micro_batches) == work


@settings(max_examples=portion(60))
@given(st.integers(0, 10**6), st.booleans())
def test_a_longer_order_is_legal_fits_and_is_as_fast_for_each_micro_batch(seed, listed):
    """Further micro-batches take hardly longer than those of the short order do on average,
    beginning and end included (a round in the middle of an unsteady order may be a slow one), apart
    from at most one round in which the groups fall into step."""
    work = long_work(seed)
    short = shortened(work)
    codes = best_order(short, 1) if listed else named(short)
    long = codes and lengthened(work, short, codes)
    if long is None:
        return
    orders = to_orders(long)
    check_orders(orders, work.layout, work.micro_batches, source="test", where="pipelines[0]")
    assert to_codes(orders) == long
    assert fits(work, long)
    assert play(work, long) is not None
    more = work.micro_batches - short.micro_batches
    each = 1.25 * seconds(short, codes) / short.micro_batches
    assert seconds(work, long) <= seconds(short, codes) + (more + (more > 0)) * each


def named(work):
    """1F1B, if it fits."""
    codes = to_codes(schedule_orders("1f1b", work.layout, work.micro_batches))
    return codes if fits(work, codes) else None


@given(st.integers(1, 6), st.integers(1, 200))
def test_1f1b_for_many_is_1f1b_for_few_with_more_rounds(stages, count):
    work = even_work(stages, count)
    short = shortened(work)
    found = lengthened(work, short, named(short))
    assert found == named(work)


def test_an_order_without_a_steady_state_is_not_lengthened():
    """GPipe has no backward between two forwards."""
    work = even_work(3, 100)
    short = shortened(work)
    codes = to_codes(schedule_orders("gpipe", work.layout, short.micro_batches))
    assert lengthened(work, short, codes) is None


def test_an_order_of_the_same_length_stays_as_it_is():
    work = even_work(2, LEAST)
    codes = named(work)
    assert shortened(work) == work
    assert lengthened(work, work, codes) == codes


@settings(max_examples=portion(25))
@given(st.integers(0, 10**6))
def test_many_micro_batches_are_never_behind_the_schedules_that_are_tried_on_long_pipelines(seed):
    """With an allowance that is too small to place every action of many orders."""
    work = replace(random_work(Random(seed)), micro_batches=100)
    codes = best_order(work, 2_000)
    assert codes is not None
    assert fits(work, codes)
    tried = [to_codes(schedule_orders(n, work.layout, 100)) for n in ("eager-1f1b", "zb-h1")]
    for other in (each for each in tried if fits(work, each)):
        assert seconds(work, codes) <= seconds(work, other)


def even_work(stages, count):
    ones = (1.0,) * stages
    return Work(
        layout=tuple((s,) for s in range(stages)),
        micro_batches=count,
        forward=ones,
        whole=(2.0,) * stages,
        inputs=ones,
        weights=ones,
        onward=(0.0,) * (stages - 1),
        back=(0.0,) * (stages - 1),
        full=ones,
        half=ones,
        room=(1000.0,) * stages,
    )

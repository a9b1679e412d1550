"""Named schedules: sound for any depth and count, within their memory, and as fast as published."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.ranks import EXPLICIT_SCHEDULES
from meshwright.plan.spec import ScheduleName
from meshwright.program.actions import format_order, parse_order, peak_held, with_joined_weights
from meshwright.program.codes import to_codes, to_orders
from meshwright.program.operations import Op
from meshwright.program.orders import check_orders
from meshwright.program.schedules import in_flight, schedule_orders, zb_v
from meshwright.program.work import Work, most_held, play

NAMED = tuple(name for name in get_args(ScheduleName) if name not in EXPLICIT_SCHEDULES)


def layout(schedule: str, groups: int, chunks: int = 2) -> tuple[tuple[int, ...], ...]:
    if schedule == "zb-v":
        return tuple((s, 2 * groups - 1 - s) for s in range(groups))
    if schedule.startswith("interleaved"):
        return tuple(tuple(range(s, groups * chunks, groups)) for s in range(groups))
    return tuple((s,) for s in range(groups))


def even(
    schedule: str, groups: int, count: int, times: tuple[int, int, int] = (1, 1, 1), chunks: int = 2
) -> Work:
    """Equal stages with free transfers; F, I and W in seconds."""
    places = layout(schedule, groups, chunks)
    stages = sum(map(len, places))
    f, i, w = ((float(each),) * stages for each in times)
    return Work(
        layout=places,
        micro_batches=count,
        forward=f,
        whole=(float(times[1] + times[2]),) * stages,
        inputs=i,
        weights=w,
        onward=(0.0,) * (stages - 1),
        back=(0.0,) * (stages - 1),
        full=(1.0,) * stages,
        half=(1.0,) * stages,
        room=(float("inf"),) * groups,
    )


def bubbles(schedule: str, work: Work) -> tuple[float, float]:
    """Idle seconds: of the step, and of the group that idles most between its own first and last
    action."""
    codes = to_codes(schedule_orders(schedule, work.layout, work.micro_batches))
    ends = play(work, codes)
    assert ends is not None
    each = work.forward[0] + work.inputs[0] + work.weights[0]
    busy = each * work.micro_batches * len(work.layout[0])
    spans = [own[-1] - (own[0] - work.forward[0]) for own in ends]
    return max(own[-1] for own in ends) - busy, max(spans) - busy


@pytest.mark.parametrize("schedule", NAMED)
@given(groups=st.integers(1, 6), count=st.integers(1, 17), chunks=st.integers(1, 3))
def test_every_named_schedule_does_everything_once_and_ends(schedule, groups, count, chunks):
    places = layout(schedule, groups, chunks)
    found = schedule_orders(schedule, places, count)
    check_orders(found, places, count, source="test", where="pipelines[0]")


@pytest.mark.parametrize("schedule", NAMED)
@given(groups=st.integers(1, 6), count=st.integers(1, 17), chunks=st.integers(1, 3))
def test_backwards_that_nobody_waits_for_stay_whole(schedule, groups, count, chunks):
    """On the first stage two parts are worth their passes only if forwards come between them."""
    order = schedule_orders(schedule, layout(schedule, groups, chunks), count)[0]
    waited_for = [k for k, action in enumerate(order) if action.op is Op.FORWARD or action.stage]
    for k, action in enumerate(order):
        if action.op is Op.BACKWARD_INPUT and action.stage == 0:
            weight = next(
                n
                for n, other in enumerate(order)
                if other.op is Op.BACKWARD_WEIGHT
                and other.stage == 0
                and other.first <= action.first < other.last
            )
            assert any(k < n < weight for n in waited_for)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        ("1f1b-2bp", "F0 F1 I0 F2 B1 B2 W0", "F0 I0 F1 I1 F2 I2 W0 W1 W2"),
        ("1f1b-2bp-batched", "F0 F1 I0 F2 B1 B2 W0", "F0 I0 F1 I1 F2 I2 W0:3"),
    ],
)
def test_2bp_as_it_is_written_down(schedule, first, last):
    """What waits at the end is one pass if it is batched; backwards after the last forward of the
    first stage stay whole."""
    found = [
        format_order(order, alone=True) for order in schedule_orders(schedule, ((0,), (1,)), 3)
    ]
    assert found == [first, last]


@pytest.mark.parametrize("schedule", NAMED)
@given(groups=st.integers(1, 4), count=st.integers(1, 9))
def test_words_and_numbers_say_the_same_as_actions(schedule, groups, count):
    places = layout(schedule, groups)
    found = schedule_orders(schedule, places, count)
    for order, held in zip(found, places, strict=True):
        text = format_order(order, alone=len(held) == 1)
        assert parse_order(text, held, source="test", field="actions[0]") == order
    single = to_orders(to_codes(found))
    if not schedule.endswith("-batched"):
        assert single == found


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("base", "count", "without", "with_2bp"),
    [
        (
            "gpipe",
            lambda _: 1,
            lambda n: Fraction(n - 1, n),
            lambda n: Fraction(2 * n - 2, 2 * n + 1),
        ),
        (
            "gpipe",
            lambda n: n,
            lambda n: Fraction(n - 1, 2 * n - 1),
            lambda n: Fraction(2 * n - 2, 5 * n - 2),
        ),
        (
            "1f1b",
            lambda n: n,
            lambda n: Fraction(n - 1, 2 * n - 1),
            lambda n: Fraction(n - 1, 4 * n - 1),
        ),
        (
            "1f1b",
            lambda n: 2 * n,
            lambda n: Fraction(n - 1, 3 * n - 1),
            lambda n: Fraction(n - 1, 7 * n - 1),
        ),
    ],
)
def test_bubbles_of_2bp(stages, base, count, without, with_2bp):
    """The table of 2BP (arXiv 2405.18047) for unit times: share of the step that is idle."""
    for schedule, share in (
        (base, without),
        (f"{base}-2bp", with_2bp),
        (f"{base}-2bp-batched", with_2bp),
    ):
        work = even(schedule, stages, count(stages))
        idle, _ = bubbles(schedule, work)
        assert idle / (idle + 3 * count(stages)) == float(share(stages))


@given(
    groups=st.integers(2, 8),
    more=st.integers(0, 8),
    times=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
def test_bubbles_of_the_zero_bubble_family(groups, more, times):
    """(p - 1)(F + I + W) for 1F1B, and less by W for ZB-H1 and by 2W for ZB-H2, whose stages do not
    wait for each other at the end: its bubble is between a stage's own first and last action."""
    f, i, w = times
    count = 2 * groups + more
    assert bubbles("1f1b", even("1f1b", groups, count, times))[0] == (groups - 1) * (f + i + w)
    if w <= min(f, i):
        assert bubbles("zb-h1", even("zb-h1", groups, count, times))[0] == (groups - 1) * (
            f + i - w
        )
        assert bubbles("zb-h2", even("zb-h2", groups, count, times))[1] == (groups - 1) * (
            f + i - 2 * w
        )


@given(groups=st.integers(2, 8), more=st.integers(0, 8), unit=st.integers(1, 3))
def test_no_group_of_zb_v_idles_between_its_first_and_last_action(groups, more, unit):
    work = even("zb-v", groups, 2 * groups - 1 + more, (unit, unit, unit))
    assert bubbles("zb-v", work)[1] == 0


@given(groups=st.integers(1, 8), data=st.data())
def test_fewer_micro_batches_of_zb_v_leave_gaps_in_the_same_pattern(groups, data):
    whole = 2 * groups - 1
    count = data.draw(st.integers(1, whole))
    wholes, fewer = to_orders(zb_v(groups, whole)), to_orders(zb_v(groups, count))
    for own, few in zip(wholes, fewer, strict=True):
        assert tuple(action for action in own if action.last <= count) == few


@given(groups=st.integers(1, 6), chunks=st.integers(1, 4), rounds=st.integers(1, 4))
def test_bubble_of_interleaving_is_that_of_one_chunk(groups, chunks, rounds):
    work = even("interleaved-1f1b", groups, groups * rounds, (1, 1, 1), chunks)
    assert bubbles("interleaved-1f1b", work)[0] == 3 * (groups - 1)


@given(groups=st.integers(1, 8), count=st.integers(1, 20))
def test_memory_of_the_zero_bubble_family(groups, count):
    """ZB-H1 and ZB-V hold no more than 1F1B does on its first stage, ZB-H2 twice that less one."""
    for schedule, most in (("zb-h1", groups), ("zb-h2", 2 * groups - 1), ("zb-v", 2 * groups)):
        work = even(schedule, groups, count)
        codes = to_codes(schedule_orders(schedule, work.layout, count))
        held = [most_held(work, own) for own in codes]
        assert max(held) <= most
        if count >= 2 * groups:
            assert max(held) == most
        if schedule != "zb-v":
            assert held == [in_flight(schedule, s, groups, count) for s in range(groups)]


def test_eager_1f1b_lets_a_transfer_hide_behind_computing():
    """Transfers as long as a forward: the eager order hides those that plain 1F1B waits for."""
    base = even("1f1b", 4, 32)
    fields = {name: getattr(base, name) for name in Work.__dataclass_fields__}
    slow = Work(**{**fields, "onward": (1.0,) * 3, "back": (1.0,) * 3})
    took = {}
    for schedule in ("1f1b", "eager-1f1b"):
        codes = to_codes(schedule_orders(schedule, slow.layout, 32))
        ends = play(slow, codes)
        assert ends is not None
        took[schedule] = max(own[-1] for own in ends)
    assert took["eager-1f1b"] < 0.75 * took["1f1b"]


@pytest.mark.parametrize(
    ("order", "joined"),
    [
        ("F0 F1 I0 I1 W0 W1", "F0 F1 I0 I1 W0:2"),
        ("F0 I0 W0 F1 I1 W1", "F0 I0 W0 F1 I1 W1"),
        ("F0 F1 F2 I0 I1 I2 W0:2 W2", "F0 F1 F2 I0 I1 I2 W0:3"),
        ("F0 F1 I0 I1 W1 W0", "F0 F1 I0 I1 W1 W0"),
    ],
)
def test_weight_parts_that_follow_each_other_are_joined(order, joined):
    """Not those that something comes between, nor those of micro-batches that do not."""
    found = with_joined_weights(parse_order(order, (0,), source="test", field="x"))
    assert format_order(found, alone=True) == joined


def test_weight_parts_of_unlike_stages_are_not_joined():
    text = "0F0 1F0 1F1 1I0 1I1 0I0 0W0 1W0 1W1"
    found = with_joined_weights(parse_order(text, (0, 1), source="test", field="x"))
    assert format_order(found, alone=False).endswith("0W0 1W0:2")


def test_high_water_counts_both_parts_of_a_backward():
    order = parse_order("F0 F1 I0 I1 W0:2", (0,), source="test", field="x")
    assert order[-1] == (Op.BACKWARD_WEIGHT, 0, 0, 2)
    assert peak_held(order, lambda _: 2.0, lambda _: 3.0) == 6.0


BAD = {
    "unknown": (("F0 X0", "F0 B0"), "word 1: found 'X0'"),
    "missing": (("F0", "F0 B0"), "no B0"),
    "weight missing": (("F0 I0", "F0 B0"), "no W0"),
    "twice": (("F0 F0 B0", "F0 B0"), "each action once"),
    "too many": (("F0 B0 F1 B1", "F0 B0"), "below 1"),
    "backward first": (("B0 F0", "F0 B0"), "its F0 before it"),
    "weight first": (("F0 W0 I0", "F0 B0"), "its I0 before it"),
    "both": (("F0 I0 B0 W0", "F0 B0"), "not both"),
    "few texts": (("F0 B0",), "one for each pipeline rank"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_actions_are_refused_by_word(case):
    from meshwright.program.orders import _checked

    actions, wanted = BAD[case]
    with pytest.raises(PlanError) as caught:
        _checked(actions, ((0,), (1,)), 1, "plan p", "pipelines[0]")
    assert wanted in str(caught.value), str(caught.value)


def test_actions_that_wait_for_ever_are_refused_by_word():
    from meshwright.program.orders import _checked

    with pytest.raises(PlanError, match="F1, which waits for 0F1 for ever"):
        _checked(("F0 B0 F1 B1", "F0 F1 B0 B1"), ((0,), (1,)), 2, "plan p", "pipelines[0]")

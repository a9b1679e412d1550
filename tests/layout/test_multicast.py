"""Senders and orders of multicasts."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.layout.multicast import (
    Multicast,
    by_size,
    lower_bound,
    makespan,
    ports,
    schedule_multicasts,
    timed,
)
from soaks import portion

SOURCES, TARGETS = ("a", "b", "c"), ("x", "y", "z")


def some(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple)


def tasks(most: int) -> st.SearchStrategy[list[Multicast]]:
    one = st.builds(
        Multicast,
        size=st.integers(1, 5).map(float),
        senders=some(SOURCES),
        receivers=some(TARGETS),
    )
    return st.lists(one, min_size=1, max_size=most)


def best_of_all(found: list[Multicast]) -> float:
    """Every order, every sender."""
    return min(
        makespan(timed(found, [(index, senders[index]) for index in order]))
        for order in permutations(range(len(found)))
        for senders in product(*(task.senders for task in found))
    )


@settings(max_examples=portion(60), deadline=None)
@given(tasks(4))
def test_few_tasks_are_ordered_best(found: list[Multicast]) -> None:
    wanted = best_of_all(found)
    assert lower_bound(found) <= wanted + 1e-9
    assert makespan(schedule_multicasts(found)) == pytest.approx(wanted)


@settings(max_examples=portion(40), deadline=None)
@given(tasks(30))
def test_turns_share_no_port(found: list[Multicast]) -> None:
    turns = schedule_multicasts(found)
    assert sorted(turn.task for turn in turns) == list(range(len(found)))
    used = defaultdict(list)
    for turn in turns:
        assert turn.sender in found[turn.task].senders
        assert turn.end - turn.start == pytest.approx(found[turn.task].size)
        for port in ports(found[turn.task], turn.sender):
            used[port].append((turn.start, turn.end))
    for spans in used.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
    assert makespan(turns) >= lower_bound(found) - 1e-9
    assert makespan(turns) <= makespan(timed(found, by_size(found))) + 1e-9 or len(found) > 8
    assert schedule_multicasts(found) == turns


def test_the_longest_are_dealt_first() -> None:
    """A half, two quarters and so on of what each of eight hosts sends: the small fill up what the
    large have left, without a gap."""
    hosts = tuple("abcdefgh")
    sizes = [2.0**k for k in range(8) for _ in range(128 // 2**k)]
    found = [
        Multicast(size=size, senders=hosts, receivers=(f"t{n}",)) for n, size in enumerate(sizes)
    ]
    assert makespan(schedule_multicasts(found)) == lower_bound(found) == sum(sizes) / 8


@pytest.mark.parametrize("count", [8, 16, 64])
def test_all_to_all_is_free_of_contention(count: int) -> None:
    """Every sender to every receiver, in as many rounds as there are receivers."""
    found = [
        Multicast(size=1.0, senders=(f"s{k % 4}",), receivers=(f"t{k // 4 % 4}",))
        for k in range(count)
    ]
    assert makespan(schedule_multicasts(found)) == lower_bound(found)


def test_nothing_to_order() -> None:
    assert schedule_multicasts([]) == ()
    assert lower_bound([]) == 0.0

"""Messages that turn one layout into another."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import pairs

from meshwright.layout.reshard import Strategy, messages, reshard
from meshwright.layout.tiles import Layout, elements, layout, unit_tasks


def hosts_of(count: int, per_host: int) -> dict[int, str]:
    return {rank: f"h{rank // per_host}" for rank in range(count)}


@settings(deadline=None)
@given(
    pairs(),
    st.sampled_from([None, "send", "gather", "broadcast"]),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_every_element_is_brought_once_after_its_sender_has_it(
    pair: tuple[Layout, Layout], strategy: Strategy | None, per_host: int, chunks: int
) -> None:
    source, target = pair
    hosts = hosts_of(60, per_host)
    brought: Counter[tuple[int, tuple[tuple[int, int], ...]]] = Counter()
    for transfer in reshard(source, target, hosts, strategy):
        whole = list(range(elements(transfer.tile)))
        here: dict[int, list[int]] = {transfer.source: whole}
        for message in messages(transfer, hosts, chunks):
            part = list(range(*message.part))
            assert part
            assert set(part) <= set(here[message.source])
            here.setdefault(message.target, []).extend(part)
        for rank in transfer.receivers:
            assert sorted(here[rank]) == whole
            brought[rank, transfer.tile] += 1
    wanted = Counter(
        (rank, task.tile) for task in unit_tasks(source, target) for rank in task.receivers
    )
    assert brought == wanted


def test_broadcast_crosses_the_network_once_for_each_host() -> None:
    """As few bytes as any way has: each host gets what it must have once."""
    hosts = hosts_of(12, 4)
    source = layout((64,), range(4), (1, 4), ((1,),))
    target = layout((64,), range(4, 12), (2, 4), ((),))
    crossed: Counter[str] = Counter()
    for transfer in reshard(source, target, hosts):
        for message in messages(transfer, hosts, 4):
            if hosts[message.source] != hosts[message.target]:
                crossed[hosts[message.target]] += message.part[1] - message.part[0]
    assert crossed == {"h1": 64, "h2": 64}


@pytest.mark.parametrize("strategy", ["send", "gather", "broadcast"])
def test_what_is_near_stays_near(strategy: Strategy) -> None:
    """A replica on the receiver's own host serves it."""
    source = layout((8,), (0, 2), (2,), ((),))
    target = layout((8,), (1, 3), (2,), ((),))
    found = reshard(source, target, hosts_of(4, 2), strategy)
    assert [(t.source, t.receivers) for t in found] == [(0, (1,)), (2, (3,))]

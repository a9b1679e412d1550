"""Messages that turn one layout into another."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import Pair, pairs

from meshwright.layout.boxes import Box, whole
from meshwright.layout.reshard import reshard
from meshwright.layout.shares import cut, own_share
from meshwright.layout.tiles import unit_tasks


def hosts_of(count: int, per_host: int) -> dict[int, str]:
    return {rank: f"h{rank // per_host}" for rank in range(count)}


@settings(deadline=None)
@given(pairs(), st.integers(1, 4))
def test_transfers_carry_out_the_unit_tasks_and_what_is_near_stays_near(
    pair: Pair, per_host: int
) -> None:
    _, source, target = pair
    hosts = hosts_of(60, per_host)
    brought: Counter[tuple[int, Box]] = Counter()
    tasks = {task.box: task for task in unit_tasks(source, target)}
    for transfer in reshard(source, target, hosts):
        holders = tasks[transfer.box].holders
        assert transfer.source in holders
        near = {hosts[rank] for rank in holders}
        for rank in transfer.receivers:
            brought[rank, transfer.box] += 1
            assert hosts[rank] == hosts[transfer.source] or hosts[rank] not in near
        at = [hosts[rank] for rank in transfer.receivers]
        assert at == sorted(at, key=at.index), "receivers are listed host by host"
    wanted = Counter(
        (rank, task.box) for task in unit_tasks(source, target) for rank in task.receivers
    )
    assert brought == wanted


def test_broadcast_crosses_the_network_once_for_each_host() -> None:
    """As few elements as any way has: each host gets what it must have once."""
    hosts = hosts_of(12, 4)
    source = {rank: ((cut(64, own_share(4, rank)),),) for rank in range(4)}
    target = dict.fromkeys(range(4, 12), (whole((64,)),))
    crossed: Counter[str] = Counter()
    for transfer in reshard(source, target, hosts):
        for a, b in pairwise((transfer.source, *transfer.receivers)):
            if hosts[a] != hosts[b]:
                ((first, last),) = transfer.box
                crossed[hosts[b]] += last - first
    assert crossed == {"h1": 64, "h2": 64}


def test_a_copy_on_the_own_host_serves_a_receiver() -> None:
    source = dict.fromkeys((0, 2), (whole((8,)),))
    target = dict.fromkeys((1, 3), (whole((8,)),))
    found = reshard(source, target, hosts_of(4, 2))
    assert [(t.source, t.receivers) for t in found] == [(0, (1,)), (2, (3,))]

"""Plans the transfers from one layout to another: which messages carry what, by which strategy, in
which order."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from meshwright.layout.order import Multicast, Turn, best_order
from meshwright.layout.tiles import (
    Layout,
    Tile,
    UnitTask,
    elements,
    even_cuts,
    is_empty,
    unit_tasks,
)
from meshwright.records import record

Strategy = Literal["send", "gather", "broadcast"]
"""How a tile travels. `send`: the whole tile to every receiver. `gather`: a part of the tile to
each receiver of a host, and these then all-gather the parts. `broadcast`: a chain from host to
host, and inside each from rank to rank, in which each rank forwards chunk by chunk what it
receives."""


@record
class Transfer:
    """One unit task with its sender."""

    tile: Tile
    source: int
    receivers: tuple[int, ...]
    """Receivers host by host, in the order of a chain."""
    strategy: Strategy


@record
class Message:
    """One point-to-point message: a range of the elements of a transfer's tile, counted in
    row-major order."""

    source: int
    target: int
    part: tuple[int, int]
    """Range of elements: [first, last)."""


Order = Callable[[Sequence[Multicast]], Sequence[Turn]]
"""A function that chooses the hosts that send, and the order."""


def reshard(
    source: Layout,
    target: Layout,
    hosts: Mapping[int, str],
    strategy: Strategy | None = None,
    order: Order = best_order,
) -> tuple[Transfer, ...]:
    """Return the transfers that turn `source` into `target`, in the order in which they should
    begin.

    `hosts` gives the host of each rank. Without a strategy, a task with one receiver is a send and
    any other a broadcast. Receivers on a host that already holds the tile get it from there; only
    the other hosts are reached over the network.
    """
    tasks = unit_tasks(source, target)
    found = [
        _transfer(task.tile, _on(host, task.holders, hosts), ranks, strategy, 0)
        for task in tasks
        for host, ranks in _receivers(task, hosts, near=True).items()
    ]
    remote = [task for task in tasks if _receivers(task, hosts, near=False)]
    sent: dict[str, int] = defaultdict(int)
    for turn in order(multicasts(remote, hosts)):
        task = remote[turn.task]
        far = _receivers(task, hosts, near=False)
        ranks = tuple(rank for group in far.values() for rank in group)
        senders = _on(turn.sender, task.holders, hosts)
        found.append(_transfer(task.tile, senders, ranks, strategy, sent[turn.sender]))
        sent[turn.sender] += 1
    return tuple(found)


def multicasts(tasks: Sequence[UnitTask], hosts: Mapping[int, str]) -> list[Multicast]:
    """Return the multicasts that unit tasks need between hosts, with sizes in elements; hosts that
    hold the tile need none."""
    return [
        Multicast(
            size=elements(task.tile),
            senders=tuple(dict.fromkeys(hosts[rank] for rank in task.holders)),
            receivers=tuple(_receivers(task, hosts, near=False)),
        )
        for task in tasks
    ]


def _receivers(
    task: UnitTask, hosts: Mapping[int, str], *, near: bool
) -> dict[str, tuple[int, ...]]:
    """Group the receivers by host: on hosts that hold the tile if `near`, else on the others."""
    have = {hosts[rank] for rank in task.holders}
    groups: dict[str, list[int]] = defaultdict(list)
    for rank in task.receivers:
        groups[hosts[rank]].append(rank)
    return {host: tuple(ranks) for host, ranks in groups.items() if (host in have) is near}


def _on(host: str, ranks: Sequence[int], hosts: Mapping[int, str]) -> list[int]:
    return [rank for rank in ranks if hosts[rank] == host]


def _transfer(
    tile: Tile,
    senders: Sequence[int],
    receivers: tuple[int, ...],
    strategy: Strategy | None,
    turn: int,
) -> Transfer:
    chosen = strategy or ("send" if len(receivers) == 1 else "broadcast")
    return Transfer(
        tile=tile, source=senders[turn % len(senders)], receivers=receivers, strategy=chosen
    )


def messages(transfer: Transfer, hosts: Mapping[int, str], chunks: int = 1) -> Iterator[Message]:
    """Yield the point-to-point messages of a transfer, each after those that bring what it carries.

    A broadcast is cut into `chunks` pieces, one of which is forwarded while the next arrives.
    """
    size = elements(transfer.tile)
    if transfer.strategy == "send":
        for rank in transfer.receivers:
            yield Message(source=transfer.source, target=rank, part=(0, size))
    elif transfer.strategy == "broadcast":
        ends = even_cuts(size, max(1, min(chunks, size)))
        chain = (transfer.source, *transfer.receivers)
        for part in itertools.pairwise(ends):
            for source, target in itertools.pairwise(chain):
                yield Message(source=source, target=target, part=part)
    else:
        groups: dict[str, list[int]] = defaultdict(list)
        for rank in transfer.receivers:
            groups[hosts[rank]].append(rank)
        for ranks in groups.values():
            yield from _gathered(transfer.source, ranks, size)


def _gathered(source: int, ranks: Sequence[int], size: int) -> Iterator[Message]:
    """Yield the messages that give each rank one part, then those of a ring all-gather, in each
    step of which every rank forwards the part it received last."""
    count = len(ranks)
    ends = even_cuts(size, count)
    parts = list(itertools.pairwise(ends))
    filled = [k for k in range(count) if not is_empty((parts[k],))]
    for k in filled:
        yield Message(source=source, target=ranks[k], part=parts[k])
    for step in range(count - 1):
        for k, rank in enumerate(ranks):
            passed = (k - step) % count
            if passed in filled:
                yield Message(source=rank, target=ranks[(k + 1) % count], part=parts[passed])

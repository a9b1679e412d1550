"""Plans the transfers from one layout to another: which holder sends what to whom, in which
order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from meshwright.layout.boxes import Box, elements
from meshwright.layout.multicast import Multicast, ScheduledMulticast, schedule_multicasts
from meshwright.layout.tiles import Layout, UnitTask, unit_tasks
from meshwright.records import record


@record
class Transfer:
    """Says which rank sends one box of a tensor, and which ranks receive it."""

    box: Box
    source: int
    receivers: tuple[int, ...]
    """Receivers host by host, in the order of a chain."""


Order = Callable[[Sequence[Multicast]], Sequence[ScheduledMulticast]]
"""A function that chooses the hosts that send, and the order."""


def reshard(
    source: Layout, target: Layout, hosts: Mapping[int, str], order: Order = schedule_multicasts
) -> tuple[Transfer, ...]:
    """Returns the transfers that turn `source` into `target`, in the order in which they should
    begin.

    `hosts` gives the host of each rank. Receivers on a host that already holds the box get it from
    there; only the other hosts are reached over the network.
    """
    tasks = unit_tasks(source, target)
    found = [
        Transfer(box=task.box, source=_on(host, task.holders, hosts)[0], receivers=ranks)
        for task in tasks
        for host, ranks in _receivers(task, hosts, near=True).items()
    ]
    remote = [task for task in tasks if _receivers(task, hosts, near=False)]
    sent: dict[str, int] = defaultdict(int)
    for turn in order(multicasts(remote, hosts)):
        task = remote[turn.task]
        far = _receivers(task, hosts, near=False)
        senders = _on(turn.sender, task.holders, hosts)
        found.append(
            Transfer(
                box=task.box,
                source=senders[sent[turn.sender] % len(senders)],
                receivers=tuple(rank for group in far.values() for rank in group),
            )
        )
        sent[turn.sender] += 1
    return tuple(found)


def multicasts(tasks: Sequence[UnitTask], hosts: Mapping[int, str]) -> list[Multicast]:
    """Returns the multicasts that unit tasks need between hosts, with sizes in elements; hosts that
    hold the box need none."""
    return [
        Multicast(
            size=elements(task.box),
            senders=tuple(dict.fromkeys(hosts[rank] for rank in task.holders)),
            receivers=tuple(_receivers(task, hosts, near=False)),
        )
        for task in tasks
    ]


def _receivers(
    task: UnitTask, hosts: Mapping[int, str], *, near: bool
) -> dict[str, tuple[int, ...]]:
    """Groups the receivers by host: on hosts that hold the box if `near`, else on the others."""
    have = {hosts[rank] for rank in task.holders}
    groups: dict[str, list[int]] = defaultdict(list)
    for rank in task.receivers:
        groups[hosts[rank]].append(rank)
    return {host: tuple(ranks) for host, ranks in groups.items() if (host in have) is near}


def _on(host: str, ranks: Sequence[int], hosts: Mapping[int, str]) -> list[int]:
    return [rank for rank in ranks if hosts[rank] == host]

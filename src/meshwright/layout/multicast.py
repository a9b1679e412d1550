"""Schedules multicasts between hosts: which holder sends, and in which order, so that they rarely
wait for each other's network interfaces.

Each host has one interface, which sends one message and receives one at a time. A multicast runs as
a pipelined chain: it occupies the sending half of its source and the receiving half of every host
it reaches, all for as long as its bytes take to cross one interface; each receiver but the last
also occupies its own sending half to forward it. Choosing senders and order is the load balancing
problem of "On Optimizing the Communication of Model Parallelism", section 3.2. As in that paper the
best answer of several methods is taken: longest task first to the least loaded sender, randomised
greedy, and for few tasks a depth-first search with pruning.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from meshwright.records import record

Port = tuple[str, str]
"""One half of a host's interface: ("out" or "in", host)."""

TRIALS = 100
SEARCHED = 8
"""Largest number of tasks for which every order may be tried."""
NODES = 20_000
"""Largest number of steps of the depth-first search; a count and not a time, so that every machine
finds the same."""
TRIED_WORK = 200_000
"""Limit on (number of tasks)^2 x trials of the randomised greedy method."""
EXACT = 1 + 1e-9


@record
class Multicast:
    """Describes a message that several hosts must receive."""

    size: float
    """Bytes, or any other measure of the time that the message takes to cross an interface."""
    senders: tuple[str, ...]
    """Hosts that hold the message; one of them sends it."""
    receivers: tuple[str, ...]
    """Hosts that must receive it; none of them is a sender."""


@record
class ScheduledMulticast:
    """Says which host sends a multicast, and when it starts and ends."""

    task: int
    sender: str
    start: float
    end: float


def ports(task: Multicast, sender: str) -> tuple[Port, ...]:
    """Returns the ports that a multicast occupies."""
    onward = tuple(("out", host) for host in task.receivers[:-1])
    return (("out", sender), *(("in", host) for host in task.receivers), *onward)


def lower_bound(tasks: Sequence[Multicast]) -> float:
    """Returns a lower bound of the makespan over all choices of senders and orders.

    Every host receives all its messages through one port. Every message leaves one of its holders
    once, so the messages held only by a set of hosts leave through the ports of this set.
    """
    arriving: dict[str, float] = defaultdict(float)
    leaving: dict[frozenset[str], float] = defaultdict(float)
    for task in tasks:
        leaving[frozenset(task.senders)] += task.size
        for host in task.receivers:
            arriving[host] += task.size
    sets = set(leaving)
    if len(sets) <= SEARCHED:
        for one in tuple(leaving):
            sets |= {one | other for other in sets}
    sets.add(frozenset().union(*leaving))
    out = (
        sum(size for held, size in leaving.items() if held <= hosts) / len(hosts)
        for hosts in sets
        if hosts
    )
    return max([*arriving.values(), *out, *(task.size for task in tasks)], default=0.0)


def timed(
    tasks: Sequence[Multicast], choice: Iterable[tuple[int, str]]
) -> tuple[ScheduledMulticast, ...]:
    """Computes when each multicast runs if they take their ports in this order."""
    free: dict[Port, float] = defaultdict(float)
    turns = []
    for index, sender in choice:
        used = ports(tasks[index], sender)
        start = max(free[port] for port in used)
        end = start + tasks[index].size
        free.update(dict.fromkeys(used, end))
        turns.append(ScheduledMulticast(task=index, sender=sender, start=start, end=end))
    return tuple(sorted(turns, key=lambda turn: (turn.start, turn.task)))


def makespan(turns: Sequence[ScheduledMulticast]) -> float:
    """Returns the end of the last multicast."""
    return max((turn.end for turn in turns), default=0.0)


def schedule_multicasts(
    tasks: Sequence[Multicast], seed: int = 0
) -> tuple[ScheduledMulticast, ...]:
    """Returns the senders and the order with the smallest makespan found; the same for the same
    input."""
    bound = lower_bound(tasks) * EXACT
    best = timed(tasks, _first_come(tasks))
    for turns in _answers(tasks, seed):
        if makespan(turns) < makespan(best):
            best = turns
        if makespan(best) <= bound:
            return best
    if len(tasks) <= SEARCHED:
        best = _searched(tasks, best)
    return best


def by_size(tasks: Sequence[Multicast]) -> list[tuple[int, str]]:
    """Assigns each task, in the given order, to the holder that has least to send so far."""
    load: dict[str, float] = defaultdict(float)
    choice = []
    for index, task in enumerate(tasks):
        sender = min(task.senders, key=lambda host: load[host])
        load[sender] += task.size
        choice.append((index, sender))
    return choice


def _first_come(tasks: Sequence[Multicast]) -> list[tuple[int, str]]:
    return [(index, task.senders[0]) for index, task in enumerate(tasks)]


def _answers(tasks: Sequence[Multicast], seed: int) -> Iterator[tuple[ScheduledMulticast, ...]]:
    longest = sorted(range(len(tasks)), key=lambda index: -tasks[index].size)
    balanced = {longest[k]: s for k, s in by_size([tasks[index] for index in longest])}
    yield timed(tasks, [(index, balanced[index]) for index in longest])
    yield _dense(tasks, [0.0] * len(tasks))
    chance = random.Random(seed)
    for _ in range(min(TRIALS, TRIED_WORK // max(len(tasks), 1) ** 2)):
        yield _dense(tasks, [chance.random() for _ in tasks])


def _dense(tasks: Sequence[Multicast], luck: Sequence[float]) -> tuple[ScheduledMulticast, ...]:
    """Builds a schedule greedily: takes the task that can start first; among equals the one whose
    busiest port has most left to do, then the one with the least sum of `luck` and the time at
    which its sender is free."""
    free: dict[Port, float] = defaultdict(float)
    left: dict[Port, float] = defaultdict(float)
    for task in tasks:
        for sender in task.senders:
            for port in ports(task, sender):
                share = len(task.senders) if port == ("out", sender) else 1
                left[port] += task.size / share if port[0] == "out" else 0.0
        for host in task.receivers:
            left["in", host] += task.size
    waiting = dict.fromkeys(range(len(tasks)))
    choice = []
    while waiting:
        _, _, _, index, sender = min(
            (
                max(free[port] for port in ports(tasks[index], sender)),
                -max(left[port] for port in ports(tasks[index], sender)),
                luck[index] + free["out", sender],
                index,
                sender,
            )
            for index in waiting
            for sender in tasks[index].senders
        )
        used = ports(tasks[index], sender)
        end = max(free[port] for port in used) + tasks[index].size
        free.update(dict.fromkeys(used, end))
        for port in used:
            left[port] -= tasks[index].size
        del waiting[index]
        choice.append((index, sender))
    return timed(tasks, choice)


@dataclass(slots=True)
class _Search:
    """Keeps the state of a depth-first search: its path, the best schedule so far, and the nodes it
    may still visit."""

    tasks: Sequence[Multicast]
    best: tuple[ScheduledMulticast, ...]
    nodes: int = NODES
    path: list[tuple[int, str]] = field(default_factory=list)


def _searched(
    tasks: Sequence[Multicast], best: tuple[ScheduledMulticast, ...]
) -> tuple[ScheduledMulticast, ...]:
    """Searches every order and every sender depth first, pruning branches that cannot win."""
    search = _Search(tasks, best)
    _descend(search, frozenset(range(len(tasks))), {})
    return search.best


def _descend(search: _Search, left: frozenset[int], free: dict[Port, float]) -> None:
    search.nodes -= 1
    if not left:
        turns = timed(search.tasks, search.path)
        if makespan(turns) < makespan(search.best):
            search.best = turns
        return
    if search.nodes < 0 or _at_least(search.tasks, left, free) * EXACT >= makespan(search.best):
        return
    for index in sorted(left):
        task = search.tasks[index]
        for sender in task.senders:
            used = ports(task, sender)
            end = max(free.get(port, 0.0) for port in used) + task.size
            search.path.append((index, sender))
            _descend(search, left - {index}, free | dict.fromkeys(used, end))
            search.path.pop()


def _at_least(tasks: Sequence[Multicast], left: Iterable[int], free: dict[Port, float]) -> float:
    """Returns a lower bound of the makespan: for each port, its end so far plus what it still must
    carry."""
    ends = dict(free)
    for index in left:
        for host in tasks[index].receivers:
            ends["in", host] = ends.get(("in", host), 0.0) + tasks[index].size
        if len(tasks[index].senders) == 1:
            port = ("out", tasks[index].senders[0])
            ends[port] = ends.get(port, 0.0) + tasks[index].size
    return max(ends.values(), default=0.0)

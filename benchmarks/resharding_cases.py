"""The paper's cases of a tensor that moves between meshes, and the ways to move it.

No benchmark of its own: `resharding.py` simulates them, `resharding_run.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from resharding_messages import Strategy

from meshwright.layout.multicast import (
    Multicast,
    ScheduledMulticast,
    by_size,
    schedule_multicasts,
    timed,
)
from meshwright.layout.shares import cut, own_share
from meshwright.layout.tiles import Layout

ITEM = 4
"""Bytes of an int32."""
Mesh = tuple[int, int]
Spec = tuple[str, ...]
"""For each dimension: R, or the mesh axes that divide it: h (hosts), d (devices)."""

LARGE = (1024, 1024, 512)


@dataclass(frozen=True)
class Case:
    """A tensor on one mesh that must appear on another."""

    name: str
    source: Mesh
    target: Mesh
    shape: tuple[int, ...]
    has: Spec
    wants: Spec


CASES = (
    Case("1", (2, 4), (2, 4), LARGE, ("h", "R", "R"), ("h", "R", "R")),
    Case("2", (2, 4), (2, 4), LARGE, ("R", "R", "R"), ("h", "R", "R")),
    Case("3", (2, 4), (2, 4), LARGE, ("R", "h", "R"), ("h", "R", "R")),
    Case("4", (2, 4), (2, 4), LARGE, ("R", "hd", "R"), ("hd", "R", "R")),
    Case("5", (2, 4), (2, 4), LARGE, ("d", "R", "R"), ("h", "R", "R")),
    Case("6", (2, 4), (3, 4), (3072, 1024, 170), ("h", "R", "R"), ("h", "R", "R")),
    Case("7", (1, 4), (2, 4), LARGE, ("d", "R", "R"), ("R", "R", "R")),
    Case("8", (1, 4), (2, 4), LARGE, ("d", "R", "R"), ("R", "R", "R")),
    Case("9", (2, 4), (2, 4), LARGE, ("R", "h", "R"), ("R", "R", "h")),
)
ONE_TO_MANY = tuple(
    Case(f"1 to {h}x{d}", (1, 1), (h, d), (2**28,), ("R",), ("R",))
    for h, d in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (3, 2), (4, 2))
)
METHODS: dict[
    str, tuple[Strategy | None, Callable[[Sequence[Multicast]], Sequence[ScheduledMulticast]]]
] = {
    "send/receive": ("send", lambda works: timed(works, first_sender(works))),
    "all-gather": ("gather", lambda works: timed(works, first_sender(works))),
    "as they come": ("broadcast", lambda works: in_turn(works, first_sender(works))),
    "by size": ("broadcast", lambda works: in_turn(works, by_size(works))),
    "ordered": (None, schedule_multicasts),
}


def first_sender(works: Sequence[Multicast]) -> list[tuple[int, str]]:
    """No balancing."""
    return [(index, work.senders[0]) for index, work in enumerate(works)]


def in_turn(
    works: Sequence[Multicast], choice: list[tuple[int, str]]
) -> Sequence[ScheduledMulticast]:
    """Kept in the order of the choice, which `timed` sorts by start."""
    place = {index: k for k, (index, _) in enumerate(choice)}
    return sorted(timed(works, choice), key=lambda turn: place[turn.task])


def layouts(case: Case) -> tuple[Layout, Layout, dict[int, str]]:
    """Both sides, and the host of every rank."""
    count, more = prod(case.source), prod(case.target)
    source = layout(case.shape, range(count), case.source, axes(case.has))
    target = layout(case.shape, range(count, count + more), case.target, axes(case.wants))
    hosts = {rank: f"a{rank // case.source[1]}" for rank in range(count)}
    hosts |= {count + k: f"b{k // case.target[1]}" for k in range(more)}
    return source, target, hosts


def layout(
    shape: Sequence[int],
    ranks: Sequence[int],
    mesh: Sequence[int],
    divided: Sequence[Sequence[int]],
) -> Layout:
    """A tensor on a mesh of `ranks` (row-major, axes of sizes `mesh`). `divided` lists, for each
    dimension, the mesh axes that divide it, outermost first; it is replicated over all others."""
    tiles = {}
    for rank, place in zip(ranks, product(*map(range, mesh)), strict=True):
        box = []
        for size, axes in zip(shape, divided, strict=True):
            index = 0
            for axis in axes:
                index = index * mesh[axis] + place[axis]
            box.append(cut(size, own_share(prod(mesh[axis] for axis in axes), index)))
        tiles[rank] = (tuple(box),)
    return tiles


def axes(spec: Spec) -> list[tuple[int, ...]]:
    """Mesh axes by dimension."""
    return [tuple("hd".index(axis) for axis in each if axis != "R") for each in spec]

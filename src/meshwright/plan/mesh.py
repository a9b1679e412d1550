"""Defines the mesh of a stage: where its ranks stand along axes that have names.

Replicas of a stage stand along `data`, the outermost axis, and each takes a share of the rows.
Along the other axes, a replica divides its work. Replicas may differ in their widths along these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from functools import lru_cache
from itertools import accumulate, chain, pairwise, product
from math import prod
from typing import Generic, Literal, TypeVar, get_args

from meshwright.layout.shares import UNDIVIDED, Share, common_shares, holder
from meshwright.plan.spec import Stage
from meshwright.records import record

Axis = Literal["data", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""The axes of every mesh, from the outermost in."""
INNER_AXES = AXES[1:]
"""The axes along which a replica divides its work."""

Coordinates = tuple[int, ...]
"""The index of a member along each of AXES."""
Widths = tuple[tuple[int, ...], ...]
"""The width of each replica along each of INNER_AXES."""
Member = TypeVar("Member", covariant=True)


@record
class Mesh(Generic[Member]):
    """Arranges ranks, or devices, along the axes of a stage."""

    members: tuple[Member, ...]
    """All of them, in the order of their coordinates."""
    inner_widths: Widths

    @property
    def coordinates(self) -> tuple[Coordinates, ...]:
        """Returns the coordinates of every member."""
        return _coordinates(self.inner_widths)

    @property
    def replicas(self) -> tuple[tuple[Member, ...], ...]:
        """Returns the members of every replica."""
        ends = accumulate(map(prod, self.inner_widths), initial=0)
        return tuple(self.members[first:end] for first, end in pairwise(ends))

    def widths(self, axis: Axis) -> tuple[int, ...]:
        """Returns the width of every replica along an inner axis; along `data` there is one width,
        the number of replicas."""
        if axis == AXES[0]:
            return (len(self.inner_widths),)
        at = INNER_AXES.index(axis)
        return tuple(widths[at] for widths in self.inner_widths)

    def width(self, axis: Axis) -> int:
        """Returns the largest width along an axis."""
        return max(self.widths(axis))

    def groups(self, axis: Axis, among: Set[int] | None = None) -> tuple[tuple[Member, ...], ...]:
        """Returns the groups of members whose coordinates differ along one axis alone; with
        `among`, those with a member of these numbers."""
        groups = _groups(self.inner_widths, axis)
        return tuple(
            tuple(self.members[at] for at in group)
            for group in groups
            if among is None or not among.isdisjoint(group)
        )

    def at(self, axis: Axis, index: int) -> tuple[Member, ...]:
        """Returns the members with one index along an axis."""
        number = AXES.index(axis)
        placed = zip(self.members, self.coordinates, strict=True)
        return tuple(member for member, own in placed if own[number] == index)


@lru_cache(maxsize=64)  # the stages of a plan have few different widths
def _coordinates(inner_widths: Widths) -> tuple[Coordinates, ...]:
    return tuple(
        (replica, *inner)
        for replica, widths in enumerate(inner_widths)
        for inner in product(*map(range, widths))
    )


@lru_cache(maxsize=64)
def _groups(inner_widths: Widths, axis: Axis) -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of the members of every group along an axis."""
    number = AXES.index(axis)
    found: dict[Coordinates, list[int]] = {}
    for member, own in enumerate(_coordinates(inner_widths)):
        found.setdefault(own[:number] + own[number + 1 :], []).append(member)
    return tuple(map(tuple, found.values()))


def mesh_of(stage: Stage) -> Mesh[str]:
    """Returns the devices of a stage of a plan on its mesh."""
    return mesh_of_replicas(stage.devices)


def mesh_of_replicas(replicas: tuple[tuple[str, ...], ...]) -> Mesh[str]:
    """Returns the devices of a stage's replicas on its mesh."""
    return Mesh(
        members=tuple(chain.from_iterable(replicas)),
        inner_widths=tuple((len(replica),) for replica in replicas),
    )


def stacked(meshes: Iterable[Mesh[Member]]) -> Mesh[Member]:
    """Returns the replicas of several meshes as one mesh; the same replica counts once."""
    replicas = dict(
        pair for mesh in meshes for pair in zip(mesh.replicas, mesh.inner_widths, strict=True)
    )
    return Mesh(members=tuple(chain.from_iterable(replicas)), inner_widths=tuple(replicas.values()))


def copies(mesh: Mesh[int]) -> Iterator[tuple[tuple[int, ...], Share | None]]:
    """Yields the groups of ranks that hold the same elements of layers, each with the share of the
    layers' divided elements that the group holds.

    If all replicas have the same tensor width, these are the groups along `data`, and the share is
    None: all that a rank holds. Otherwise one group of all ranks holds what is UNDIVIDED, and each
    common share has a group of its own.
    """
    widths = mesh.widths("tensor")
    if len(set(widths)) == 1:
        yield from ((tuple(sorted(group)), None) for group in mesh.groups("data"))
        return
    yield tuple(sorted(mesh.members)), UNDIVIDED
    for share in common_shares(widths):
        yield tuple(sorted(each[holder(share, len(each))] for each in mesh.groups("tensor"))), share


def mesh_text(mesh: Mesh[object], sign: str = "x") -> str:
    """Formats a mesh as the product of its widths, data x tensor, `2 x 4`; replicas of unlike
    widths as `4 + 2 + 2`."""
    if len(set(mesh.inner_widths)) > 1:
        return " + ".join(f" {sign} ".join(map(str, widths)) for widths in mesh.inner_widths)
    return f" {sign} ".join(str(mesh.width(axis)) for axis in AXES)


def widths_text(mesh: Mesh[object]) -> str:
    """Formats the widths of a mesh with the initials of the axes, `dp2 tp4`; unlike widths of
    replicas as `tp4+2`."""
    texts = []
    for axis in AXES:
        widths = mesh.widths(axis)
        shown = widths if len(set(widths)) > 1 else widths[:1]
        texts.append(f"{axis[0]}p" + "+".join(map(str, shown)))
    return " ".join(texts)

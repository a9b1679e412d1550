"""Every member of a mesh has one place, and the groups along each axis divide the members."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meshwright.layout.shares import UNDIVIDED, holder
from meshwright.plan.mesh import AXES, Mesh, copies, mesh_of, mesh_text, stacked, widths_text
from meshwright.plan.ranks import holders_of, rank_mesh, stage_placements
from meshwright.plan.spec import Pipeline, Stage
from worlds import plan_by_hand

WIDTHS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def stage_of(widths: list[int], *, first: int = 0) -> Stage:
    """A stage whose replicas have these tensor widths."""
    devices = iter(f"a:{n}" for n in range(first, first + sum(widths)))
    return Stage(
        layers=(0, 3), devices=tuple(tuple(next(devices) for _ in range(w)) for w in widths)
    )


@given(WIDTHS)
def test_groups_along_an_axis_divide_the_members(widths: list[int]) -> None:
    mesh = mesh_of(stage_of(widths))
    place = dict(zip(mesh.members, mesh.coordinates, strict=True))
    for number, axis in enumerate(AXES):
        groups = mesh.groups(axis)
        assert sorted(member for group in groups for member in group) == sorted(mesh.members)
        for group in groups:
            others = {place[m][:number] + place[m][number + 1 :] for m in group}
            assert len(others) == 1, "all other coordinates are equal"
            indices = [place[m][number] for m in group]
            assert indices == sorted(set(indices))
        assert max(map(len, groups)) == mesh.width(axis)


@given(WIDTHS)
def test_coordinates_tell_members_apart_and_find_them(widths: list[int]) -> None:
    mesh = mesh_of(stage_of(widths))
    assert len(set(mesh.coordinates)) == len(mesh.members)
    assert list(mesh.coordinates) == sorted(mesh.coordinates)
    for member, own in zip(mesh.members, mesh.coordinates, strict=True):
        found = set(mesh.members)
        for axis, index in zip(AXES, own, strict=True):
            found &= set(mesh.at(axis, index))
        assert found == {member}


@given(WIDTHS)
def test_replicas_are_those_of_the_plan(widths: list[int]) -> None:
    stage = stage_of(widths)
    mesh = mesh_of(stage)
    assert mesh.replicas == stage.devices == mesh.groups("tensor")
    assert mesh.widths("tensor") == tuple(widths)
    assert mesh.widths("data") == (len(widths),)
    assert stacked([mesh, mesh]) == mesh, "a replica of two stages counts once"


@given(WIDTHS, WIDTHS)
def test_stages_with_a_layer_in_common_stand_along_data(one: list[int], other: list[int]) -> None:
    pipelines = tuple(
        Pipeline(micro_batches=1, rows=len(widths), stages=(stage_of(widths, first=first),))
        for widths, first in ((one, 0), (other, sum(one)))
    )
    stages = stage_placements(plan_by_hand(*pipelines))
    held = holders_of(stages, [2])
    assert held.widths("tensor") == (*one, *other)
    assert held.replicas == tuple(r for s in stages for r in rank_mesh(s).replicas)
    for stage in stages:
        for placement, own in zip(stage.mesh.members, stage.mesh.coordinates, strict=True):
            assert placement.index("data") == own[0]
            assert placement.index("tensor") == own[1]
            assert placement.width("data") == stage.mesh.width("data")
            assert placement.width("tensor") == stage.mesh.widths("tensor")[own[0]]


@given(WIDTHS)
def test_copies_meet_every_element_once_in_every_replica(widths: list[int]) -> None:
    names = mesh_of(stage_of(widths))
    mesh = Mesh(members=tuple(range(len(names.members))), inner_widths=names.inner_widths)
    found = {share: ranks for ranks, share in copies(mesh)}
    if len(set(widths)) == 1:
        assert [ranks for ranks, _ in copies(mesh)] == list(mesh.groups("data"))
        return
    assert found.pop(UNDIVIDED) == mesh.members
    cuts = [(share.first, share.last, share.of) for share in found]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == cuts[-1][2]
    assert all(end == start for (_, end, _), (start, _, _) in pairwise(cuts))
    for share, ranks in found.items():
        assert ranks == tuple(g[holder(share, len(g))] for g in mesh.groups("tensor"))


def test_a_mesh_reads_as_its_widths() -> None:
    even, ragged = mesh_of(stage_of([2, 2, 2])), mesh_of(stage_of([2, 1]))
    assert (mesh_text(even), mesh_text(ragged)) == ("3 x 2", "2 + 1")
    assert (widths_text(even), widths_text(ragged)) == ("dp3 tp2", "dp2 tp2+1")

"""Layouts, what two of them have in common, and moves between any two; compared with numpy."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.layout.boxes import Box, elements, is_empty, run_of_elements, whole
from meshwright.layout.shares import cut, own_share
from meshwright.layout.tiles import (
    Layout,
    Tile,
    holders_of,
    joint,
    placed,
    shape_of,
    unit_tasks,
    within,
)
from meshwright.model.shard import Column, tile_of

Shape = tuple[int, ...]
Pair = tuple[Shape, Layout, Layout]


@st.composite
def on_meshes(draw: st.DrawFn, shape: Shape, first: int) -> Layout:
    """A tensor on a mesh of up to 3 axes, each of which divides one dimension or none."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dims = [draw(st.integers(-1, len(shape) - 1)) for _ in mesh]
    found = {}
    for rank, place in enumerate(product(*map(range, mesh)), start=first):
        shares = [(1, 0) for _ in shape]
        for size, index, dim in zip(mesh, place, dims, strict=True):
            if dim >= 0:
                shares[dim] = (shares[dim][0] * size, shares[dim][1] * size + index)
        ends = (cut(n, own_share(*share)) for n, share in zip(shape, shares, strict=True))
        found[rank] = (tuple(ends),)
    return found


@st.composite
def in_replicas(draw: st.DrawFn, shape: Shape, first: int) -> Layout:
    """Replicas of unlike tensor widths, of a parameter with one or two fused projections."""
    size = shape[-2] if len(shape) > 1 else shape[0]
    middle = draw(st.integers(0, size))
    split = Column(parts=draw(st.sampled_from([(), (middle, size - middle)])))
    name = "weight" if len(shape) > 1 else "bias"
    found = {}
    for width in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        for index in range(width):
            found[first + len(found)] = tile_of(split, name, shape, own_share(width, index))
    return found


@st.composite
def in_flat_shares(draw: st.DrawFn, shape: Shape, first: int) -> Layout:
    """Runs of elements, as optimizer states are divided, once or twice in unlike numbers."""
    found: Layout = {}
    size = elements(whole(shape))
    for width in draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)):
        for index in range(width):
            run = run_of_elements(shape, *cut(size, own_share(width, index)))
            found = {**found, first + len(found): tuple(run)}
    return found


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def layouts(shape: Shape, first: int) -> st.SearchStrategy[Layout]:
    """Layouts of every kind, whose ranks together hold the whole tensor."""
    return st.one_of(kind(shape, first) for kind in (on_meshes, in_replicas, in_flat_shares))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Two layouts of one tensor, on ranks apart or overlapping."""
    shape = draw(SHAPES)
    return shape, draw(layouts(shape, 0)), draw(layouts(shape, draw(st.sampled_from([0, 1, 30]))))


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in box)


def numbered(shape: Shape) -> NDArray[np.int64]:
    return np.arange(elements(whole(shape))).reshape(shape)


def held(tile: Tile, shape: Shape) -> Counter[int]:
    """How often each element, by its number, lies in a tile."""
    return Counter(int(n) for box in tile for n in numbered(shape)[at(box)].ravel())


@given(pairs())
def test_every_element_arrives_exactly_once_from_those_who_have_it(pair: Pair) -> None:
    shape, source, target = pair
    got: dict[int, Counter[int]] = {rank: Counter() for rank in target}
    for task in unit_tasks(source, target):
        assert not is_empty(task.box)
        needed = held((task.box,), shape)
        for rank, tile in source.items():
            both = needed & held(tile, shape)
            assert both == (needed if rank in task.holders else Counter()), "all of it or nothing"
        for rank in task.receivers:
            assert rank not in task.holders
            got[rank] += needed
    for rank, tile in target.items():
        assert got[rank] == held(tile, shape) - held(source.get(rank, ()), shape)


@given(pairs())
def test_moves_from_any_layout_to_any_other_give_the_same_tensor(pair: Pair) -> None:
    """Each rank sends only what it keeps, and keeps its tile joined as it will be used."""
    shape, source, target = pair
    full = numbered(shape)
    keeps = {rank: np.full(shape, -1) for rank in {**source, **target}}
    for rank, tile in source.items():
        for box in tile:
            keeps[rank][at(box)] = full[at(box)]
    for task in unit_tasks(source, target):
        for rank in task.receivers:
            keeps[rank][at(task.box)] = keeps[task.holders[0]][at(task.box)]
    again = np.full(shape, -1)
    for box, (first, *_) in holders_of(target).items():
        again[at(box)] = keeps[first][at(box)]
    assert np.array_equal(again, full)
    for rank, tile in target.items():
        assert all(np.array_equal(keeps[rank][at(box)], full[at(box)]) for box in tile)


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), layouts(shape, 0))))
def test_holders_are_all_who_hold_a_box_and_boxes_cover_the_tensor_once(
    case: tuple[Shape, Layout],
) -> None:
    shape, layout = case
    found = holders_of(layout)
    assert held(tuple(found), shape) == Counter(numbered(shape).ravel().tolist())
    for box, ranks in found.items():
        inside = held((box,), shape)
        have = [rank for rank, tile in layout.items() if inside & held(tile, shape)]
        assert list(ranks) == have, "in the order of the layout"
        assert all(inside <= held(layout[rank], shape) for rank in ranks)


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), in_replicas(shape, 0))), st.data())
def test_a_rank_finds_every_box_in_the_tensor_that_it_keeps(
    case: tuple[Shape, Layout], data: st.DataObject
) -> None:
    shape, layout = case
    full = numbered(shape)
    for tile in layout.values():
        kept = np.concatenate([full[at(box)] for box in tile], axis=joint(tile))
        assert kept.shape == shape_of(tile)
        ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in kept.shape]
        local = tuple((a, b) for a, b in ends)
        places = list(placed(tile, local))
        assert all(np.array_equal(kept[at(place)], full[at(box)]) for box, place in places)
        assert held(tuple(p for _, p in places), kept.shape) == held((local,), kept.shape)
        assert within(tile, tile) == tuple(place for _, place in placed(tile, whole(kept.shape))
                                           ) or any(map(is_empty, tile))  # fmt: skip


def test_paper_unit_tasks() -> None:
    """Case 6: two slices against three leave four pieces."""
    shape = (3072, 1024, 170)

    def slices(first: int, hosts: int) -> Layout:
        return {
            first + rank: ((cut(3072, own_share(hosts, rank // 4)), *whole(shape[1:])),)
            for rank in range(hosts * 4)
        }

    tasks = unit_tasks(slices(0, 2), slices(8, 3))
    assert [elements(task.box) // (1024 * 170) for task in tasks] == [1024, 512, 512, 1024]
    assert [len(task.receivers) for task in tasks] == [4, 4, 4, 4]

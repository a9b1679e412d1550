"""Tiles of gradients, taken out of flat buckets and put back, by ranks of unlike tensor widths."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meshwright.errors import PlanError
from meshwright.model.shard import (
    UNDIVIDED,
    Column,
    Row,
    Split,
    Tile,
    Vocabulary,
    common_tiles,
    holder,
    own_tile,
    slices,
)
from meshwright.runtime.build import Held
from meshwright.runtime.tensor import take
from meshwright.techniques.data_parallel.runtime import (
    FlatBucket,
    Members,
    gathered,
    make_bucket,
    scatter,
)

Whole = tuple[Split | None, str, Tensor]


KINDS: list[Callable[[int], tuple[Split | None, str, tuple[int, ...]]]] = [
    lambda n: (Column(parts=(n, 2 * n, n)), "weight", (4 * n, 3)),
    lambda n: (None, "weight", (n,)),
    lambda n: (Column(parts=(n, n)), "bias", (2 * n,)),
    lambda n: (Column(parts=(n, n)), "weight", (2, 2 * n, 3)),
    lambda n: (Row(), "weight", (2, 3, n)),
    lambda n: (Row(), "bias", (n,)),
    lambda n: (Vocabulary(), "weight", (n, 2)),
]


@st.composite
def parameters(draw: st.DrawFn) -> list[Whole]:
    """Whole parameters whose elements are numbered through, and how each is divided; one at least
    that is, and one that is not."""
    kinds = [*KINDS[:2], *draw(st.lists(st.sampled_from(KINDS), max_size=3))]
    found: list[Whole] = []
    for number, kind in enumerate(kinds):
        split, attribute, shape = kind(draw(st.integers(1, 13)))
        numbers = torch.arange(prod(shape), dtype=torch.float64) + 1000 * number
        found.append((split, attribute, numbers.view(shape)))
    return found


def holding(wholes: list[Whole], own: Tile, tiles: list[Tile]) -> FlatBucket:
    """The bucket of one rank, whose parameters are its slices."""
    held = []
    for number, (split, attribute, whole) in enumerate(wholes):
        ranges = split and slices(split, attribute, tuple(whole.shape), own)
        held.append(
            Held(
                name=str(number),
                parameter=nn.Parameter(whole if ranges is None else take(whole, ranges)),
                layers=(0,),
                split=None if ranges is None else split,
                attribute=attribute,
                shape=tuple(whole.shape),
            )
        )
    group: Any = None
    return make_bucket(held, own, {tile: Members(group, 2) for tile in (UNDIVIDED, *tiles)})


@given(parameters(), st.lists(st.integers(1, 6), min_size=2, max_size=3, unique=True))
def test_replicas_of_any_width_give_every_element_once_and_alike(wholes, widths):
    tiles = common_tiles(widths)
    whole_row = (Row(), "bias")
    divided = [x.flatten() for split, name, x in wholes if split and (split, name) != whole_row]
    everything = torch.cat(divided)
    first: list[Tensor] = []
    for width in widths:
        found = []
        for tile in tiles:
            index = holder(tile, width)
            mine = [other for other in tiles if holder(other, width) == index]
            bucket = holding(wholes, own_tile(width, index), mine)
            found.append(gathered(bucket, tile, [one.parameter.detach() for one in bucket.held]))
        assert torch.equal(torch.cat(found).sort().values, everything.sort().values)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@given(parameters(), st.integers(2, 6))
def test_what_is_scattered_is_what_was_gathered(wholes, width):
    tiles = list(common_tiles([1, width]))
    bucket = holding(wholes, own_tile(1, 0), tiles)
    weights = [one.parameter.detach() for one in bucket.held]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for tile in (UNDIVIDED, *tiles):
        scatter(bucket, tile, gathered(bucket, tile, weights), gradients)
    assert all(torch.equal(a, b) for a, b in zip(weights, gradients, strict=True))


def test_a_tied_parameter_that_is_divided_here_and_whole_there_is_refused():
    whole = torch.zeros(4, 2)
    group: Any = None
    one = Held(
        name="shared",
        parameter=nn.Parameter(whole),
        layers=(0,),
        split=None,
        attribute="weight",
        shape=(4, 2),
    )
    tile = Tile(first=0, last=1, of=2)
    with pytest.raises(PlanError, match="one way for all that share it"):
        make_bucket([one], own_tile(1, 0), {tile: Members(group, 2)})

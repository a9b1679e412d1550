"""Shares of gradients, taken out of flat buckets and put back, by ranks of unlike tensor widths."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meshwright.layout.shares import UNDIVIDED, Share, common_shares, holder, own_share
from meshwright.model.shard import Column, Row, Split, Vocabulary, divided_dim
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.flat_buckets import (
    FlatBucket,
    SumGroup,
    gather_tile,
    make_bucket,
    scatter_tile,
)
from meshwright.runtime.parameters import Parameter
from meshwright.runtime.slices import read_slices

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


def holding(wholes: list[Whole], own: Share, shares: list[Share]) -> FlatBucket:
    """The bucket of one rank, whose parameters are its tiles."""
    held = []
    for number, (split, attribute, whole) in enumerate(wholes):
        parameter = Parameter(
            name=f"{number}.{attribute}",
            shape=tuple(whole.shape),
            dtype=whole.dtype,
            trained=True,
            layers=(0,),
            split=None if divided_dim(split, attribute) is None else split,
        )
        tile = parameter.tile(own)
        held.append(LocalParameter(parameter, tile, nn.Parameter(read_slices(whole, tile)), (0,)))
    group: Any = None
    return make_bucket(held, own, {share: SumGroup(group, 2) for share in (UNDIVIDED, *shares)})


@given(parameters(), st.lists(st.integers(1, 6), min_size=2, max_size=3, unique=True))
def test_replicas_of_any_width_give_every_element_once_and_alike(wholes, widths):
    shares = common_shares(widths)
    whole_row = (Row(), "bias")
    divided = [x.flatten() for split, name, x in wholes if split and (split, name) != whole_row]
    everything = torch.cat(divided)
    first: list[Tensor] = []
    for width in widths:
        found = []
        for share in shares:
            index = holder(share, width)
            mine = [other for other in shares if holder(other, width) == index]
            bucket = holding(wholes, own_share(width, index), mine)
            found.append(
                gather_tile(
                    bucket, share, [one.parameter.detach() for one in bucket.local_parameters]
                )
            )
            if len(mine) == 1:  # such a rank sums its own buffer, and gathers nothing
                own = [one for one in bucket.local_parameters if one.of.split is not None]
                assert torch.equal(
                    found[-1], torch.cat([one.parameter.detach().flatten() for one in own])
                )
        assert torch.equal(torch.cat(found).sort().values, everything.sort().values)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@given(parameters(), st.integers(2, 6))
def test_what_is_scattered_is_what_was_gathered(wholes, width):
    shares = list(common_shares([1, width]))
    bucket = holding(wholes, own_share(1, 0), shares)
    weights = [one.parameter.detach() for one in bucket.local_parameters]
    gradients = [torch.zeros_like(weight) for weight in weights]
    for share in (UNDIVIDED, *shares):
        scatter_tile(bucket, share, gather_tile(bucket, share, weights), gradients)
    assert all(torch.equal(a, b) for a, b in zip(weights, gradients, strict=True))

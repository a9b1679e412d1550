"""How layers are divided among tensor ranks: a declarative table, read by tracing and runtime.

A model, or the module class of a layer, may carry

    tensor_split: dict[str, Split]   submodule name (relative to its owner) -> how it is divided
    tensor_units: int                widths that divide this number are legal (0: every width)

What is not named is held in full, and computed in full, by every tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import lcm
from typing import Any

from meshwright.records import record


@record
class Column:
    """A linear map (weight: ..., out, in) divided along its outputs.

    Each rank gets the whole input and makes its share of the output; the gradient of the input is
    summed over the ranks. No bias is summed: it is divided with the outputs.
    """

    parts: tuple[int, ...] = ()
    """Sizes of fused projections (q | k | v), each divided by itself; empty: one part."""


@record
class Row:
    """A linear map divided along its inputs: each rank makes a summand of the whole output, which
    is summed over the ranks; the bias, held in full, is added after that."""


@record
class Vocabulary:
    """An embedding table divided along the vocabulary: each rank looks up the indices it holds,
    gives zero for the others, and the result is summed over the ranks."""


@record
class VocabularyHead:
    """The output projection divided along the vocabulary, as Column; its logits stay divided and
    go to a VocabularyLoss. The vocabulary may divide unevenly."""


@record
class VocabularyLoss:
    """Cross entropy over logits that are divided along the vocabulary: maximum, sum of exponentials
    and the target's logit are met over the ranks."""


Split = Column | Row | Vocabulary | VocabularyHead | VocabularyLoss


@record
class Ranges:
    """The slices of one parameter that a rank holds: along `dim`, [first, last) each."""

    dim: int
    """Counted from the end: -1 or -2."""
    ranges: tuple[tuple[int, int], ...]


@record
class Tile:
    """A share of all that tensor ranks divide: of every part of every divided parameter, from
    share `first` to share `last` of `of` equal ones."""

    first: int
    last: int
    of: int


UNDIVIDED = Tile(first=0, last=0, of=1)
"""Nothing of what is divided: the parameters that every tensor rank holds whole."""


def own_tile(width: int, index: int) -> Tile:
    """All that rank `index` of `width` holds of what is divided."""
    return Tile(first=index, last=index + 1, of=width)


def common_tiles(widths: Iterable[int]) -> tuple[Tile, ...]:
    """The coarsest tiles, in order, of which ranks of all these tensor widths hold whole ones."""
    distinct = set(widths)
    of = lcm(*distinct)
    cuts = sorted({of // width * index for width in distinct for index in range(width + 1)})
    return tuple(Tile(first=first, last=last, of=of) for first, last in pairwise(cuts))


def holder(tile: Tile, width: int) -> int:
    """Which of `width` tensor ranks holds a common tile."""
    return tile.first * width // tile.of


def chunk(size: int, width: int, index: int) -> tuple[int, int]:
    """Share `index` of `size` rows over `width` ranks, [first, last).

    Cuts stand at size x index / width, rounded up: whatever the size, cuts of unlike widths come
    in the order of their fractions, and equal fractions are one cut.
    """
    return -(-size * index // width), -(-size * (index + 1) // width)


def splits(model: Any, modules: tuple[str, ...]) -> dict[str, Split]:
    """The table of a model (an nn.Module): qualified module names -> how they are divided.

    `modules` are the names of its layers' modules; their own tables come first, then the model's.
    """
    result: dict[str, Split] = {}
    for name in modules:
        table: Mapping[str, Split] = getattr(model.get_submodule(name), "tensor_split", {})
        result |= {f"{name}.{inner}" if inner else name: how for inner, how in table.items()}
    own: Mapping[str, Split] = getattr(model, "tensor_split", {})
    return result | dict(own)


def tensor_units(model: Any, modules: tuple[str, ...]) -> int:
    """Number that a legal tensor width divides, for a layer of these modules; 0: every width."""
    units = [int(getattr(model.get_submodule(name), "tensor_units", 0)) for name in modules]
    return next((number for number in units if number), 0)


def held(
    split: Split, parameter: str, shape: tuple[int, ...], width: int, index: int
) -> Ranges | None:
    """The part of a module's parameter ("weight" or "bias", of `shape`) that rank `index` of
    `width` holds; None: all of it."""
    return slices(split, parameter, shape, own_tile(width, index))


def slices(split: Split, parameter: str, shape: tuple[int, ...], tile: Tile) -> Ranges | None:
    """The part of a module's parameter that a tile is; None: the parameter is not divided."""
    if isinstance(split, VocabularyLoss) or (isinstance(split, Row) and parameter != "weight"):
        return None
    dim = -2 if parameter == "weight" and not isinstance(split, Row) else -1
    parts = (split.parts if isinstance(split, Column) else ()) or (shape[dim],)
    ranges = []
    start = 0
    for size in parts:
        first, _ = chunk(size, tile.of, tile.first)
        _, last = chunk(size, tile.of, tile.last - 1)
        ranges.append((start + first, start + last))
        start += size
    return Ranges(dim=dim, ranges=tuple(ranges))


def within(own: Ranges, tile: Ranges) -> Ranges:
    """Where a tile lies in what a rank holds, part by part; the tile must be among it."""
    ranges = []
    start = 0
    for (first, last), (low, high) in zip(own.ranges, tile.ranges, strict=True):
        ranges.append((start + low - first, start + high - first))
        start += last - first
    return Ranges(dim=own.dim, ranges=tuple(ranges))

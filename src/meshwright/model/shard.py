"""How tensor parallelism divides the parameters of a layer: a table that tracing and runtime read.

A model, or the module class of a layer, may carry

    tensor_split: dict[str, Split]   submodule name (relative to its owner) -> how it is divided
    tensor_units: int                widths that divide this number are legal (0: every width)

Every tensor-parallel rank holds and computes submodules that are not named in full. The width of a
tensor-parallel group is its number of ranks. Example, for a feed-forward module with hidden = 704:

    tensor_split = {"mlp.up": Column(), "mlp.down": Row()};  tensor_units = 704
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

    Each rank reads the whole input and computes its share of the output; the gradient of the input
    is all-reduced over the ranks. The bias is divided like the outputs.
    """

    parts: tuple[int, ...] = ()
    """Sizes of fused projections (q | k | v), each of which is divided separately; if empty, the
    outputs are one part."""


@record
class Row:
    """A linear map divided along its inputs: each rank computes a partial sum of the whole output,
    and an all-reduce adds them up. Every rank holds the whole bias, which is added after that."""


@record
class Vocabulary:
    """An embedding table divided along the vocabulary: each rank looks up the tokens whose rows it
    holds, gives zeros for all others, and an all-reduce adds up the results."""


@record
class VocabularyHead:
    """The output projection divided along the vocabulary, like a Column; its logits stay divided
    and go to a VocabularyLoss. The vocabulary need not be a multiple of the width."""


@record
class VocabularyLoss:
    """Cross entropy of logits that are divided along the vocabulary: the maximum, the sum of
    exponentials and the target's logit of each token are all-reduced over the ranks."""


Split = Column | Row | Vocabulary | VocabularyHead | VocabularyLoss


@record
class Ranges:
    """The slices of one parameter that a rank holds along one dimension."""

    dim: int
    """The dimension, counted from the end: -1 or -2."""
    ranges: tuple[tuple[int, int], ...]
    """Half-open ranges [first, last), one for each part of the parameter."""


@record
class Tile:
    """The same fraction of every divided parameter: each of its parts is cut into `of` equal
    shares, of which the tile covers [first, last). Rank 1 of 4 holds the tile first = 1, last = 2,
    of = 4."""

    first: int
    last: int
    of: int


UNDIVIDED = Tile(first=0, last=0, of=1)
"""The tile of parameters that are not divided, which every tensor-parallel rank holds in full."""


def own_tile(width: int, index: int) -> Tile:
    """Gives the tile that rank `index` of `width` tensor-parallel ranks holds."""
    return Tile(first=index, last=index + 1, of=width)


def common_tiles(widths: Iterable[int]) -> tuple[Tile, ...]:
    """Gives the coarsest tiles, in order, such that a rank of any of these tensor-parallel widths
    holds a whole number of them. Example: widths 2 and 3 give four tiles, cut at 1/3, 1/2, 2/3."""
    distinct = set(widths)
    of = lcm(*distinct)
    cuts = sorted({of // width * index for width in distinct for index in range(width + 1)})
    return tuple(Tile(first=first, last=last, of=of) for first, last in pairwise(cuts))


def holder(tile: Tile, width: int) -> int:
    """Gives the index of the rank, of `width` tensor-parallel ranks, that holds a common tile."""
    return tile.first * width // tile.of


def chunk(size: int, width: int, index: int) -> tuple[int, int]:
    """Gives share `index` of `size` entries divided among `width` ranks, as [first, last).

    Cuts lie at size * index / width, rounded up. Cuts for different widths are therefore in the
    order of their fractions index / width, and equal fractions give the same cut.
    """
    return -(-size * index // width), -(-size * (index + 1) // width)


def splits(model: Any, modules: tuple[str, ...]) -> dict[str, Split]:
    """Collects the `tensor_split` tables of a model (an nn.Module): qualified module name -> Split.

    `modules` are the names of the modules to look at. An entry in the model's own table replaces
    one in a module's table.
    """
    result: dict[str, Split] = {}
    for name in modules:
        table: Mapping[str, Split] = getattr(model.get_submodule(name), "tensor_split", {})
        result |= {f"{name}.{inner}" if inner else name: how for inner, how in table.items()}
    own: Mapping[str, Split] = getattr(model, "tensor_split", {})
    return result | dict(own)


def tensor_units(model: Any, modules: tuple[str, ...]) -> int:
    """Gives the number that a legal tensor-parallel width must divide, for a layer made of these
    modules; 0 means that every width is legal."""
    units = [int(getattr(model.get_submodule(name), "tensor_units", 0)) for name in modules]
    return next((number for number in units if number), 0)


def held(
    split: Split, parameter: str, shape: tuple[int, ...], width: int, index: int
) -> Ranges | None:
    """Gives the part of a module's parameter ("weight" or "bias", of `shape`) that rank `index` of
    `width` holds; None means all of it."""
    return slices(split, parameter, shape, own_tile(width, index))


def slices(split: Split, parameter: str, shape: tuple[int, ...], tile: Tile) -> Ranges | None:
    """Gives the part of a module's parameter that a tile covers; None if it is not divided."""
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
    """Gives the place of a tile inside the slices that a rank holds, part by part; the rank must
    hold the whole tile."""
    ranges = []
    start = 0
    for (first, last), (low, high) in zip(own.ranges, tile.ranges, strict=True):
        ranges.append((start + low - first, start + high - first))
        start += last - first
    return Ranges(dim=own.dim, ranges=tuple(ranges))

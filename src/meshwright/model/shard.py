"""Says how tensor parallelism divides the parameters of a layer, in a table that tracing and
runtime read.

A model, or the module class of a layer, may carry

    tensor_split: dict[str, Split]   submodule name (relative to its owner) -> how it is divided
    tensor_units: int                widths that divide this number are legal (0: every width)

Every tensor-parallel rank holds and computes submodules that are not named in full. The width of a
tensor-parallel group is its number of ranks. Example, for a feed-forward module with hidden = 704:

    tensor_split = {"mlp.up": Column(), "mlp.down": Row()};  tensor_units = 704
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.layout.boxes import whole
from meshwright.layout.shares import Share, cut
from meshwright.layout.tiles import Tile
from meshwright.records import record


@record
class Column:
    """Divides a linear map (weight: ..., out, in) along its outputs.

    Each rank reads the whole input and computes its share of the output; the gradient of the input
    is all-reduced over the ranks. The bias is divided like the outputs.
    """

    parts: tuple[int, ...] = ()
    """Sizes of fused projections (q | k | v), each of which is divided separately; if empty, the
    outputs are one part."""


@record
class Row:
    """Divides a linear map along its inputs: each rank computes a partial sum of the whole output,
    and an all-reduce adds the partial sums up. Every rank holds the whole bias, which is added
    after that."""


@record
class Vocabulary:
    """Divides an embedding table along the vocabulary: each rank looks up the tokens whose rows it
    holds and gives zeros for all others, and an all-reduce adds the results up."""


@record
class VocabularyHead:
    """Divides the output projection along the vocabulary, as Column does; its logits stay divided
    and go to a VocabularyLoss. The vocabulary need not be a multiple of the width."""


@record
class VocabularyLoss:
    """Computes cross entropy from logits that are divided along the vocabulary: for each token, the
    maximum, the sum of exponentials and the target's logit are all-reduced over the ranks."""


Split = Column | Row | Vocabulary | VocabularyHead | VocabularyLoss


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


def divided_dim(split: Split | None, parameter: str) -> int | None:
    """Gives the dimension, counted from the end, along which a module's parameter ("weight" or
    "bias") is divided; None if every rank holds all of it."""
    if split is None or isinstance(split, VocabularyLoss):
        return None
    if isinstance(split, Row):
        return -1 if parameter == "weight" else None
    return -2 if parameter == "weight" else -1


def tile_of(split: Split | None, parameter: str, shape: tuple[int, ...], share: Share) -> Tile:
    """Gives the part of a module's parameter that a share covers, with a box for each of its fused
    projections; the whole parameter if it is not divided."""
    dim = divided_dim(split, parameter)
    if dim is None:
        return (whole(shape),)
    boxes, start = [], 0
    for size in (split.parts if isinstance(split, Column) else ()) or (shape[dim],):
        first, last = cut(size, share)
        box = list(whole(shape))
        box[dim] = (start + first, start + last)
        boxes.append(tuple(box))
        start += size
    return tuple(boxes)

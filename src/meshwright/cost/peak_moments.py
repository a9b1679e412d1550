"""Finds the peak of a stage's backward: the layer at work, and what the layers before it still
keep.

When the backward of layer l begins, the layers after it have freed what they kept. The peak of the
layers [first, last) is therefore max over l of kept(first..l) + temporaries(l), which is looked up
in constant time for any range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.model.spec import Layer, LayerGraph, Moment
from meshwright.records import record

Array = NDArray[np.float64]
Ints = int | NDArray[np.int64]


@record
class PeakMoments:
    """Holds the byte counts of every layer's peak moments, [moment, layer], padded with zeros.

    A layer may have several moments that can be its peak, depending on rows and tensor width.
    `fixed` bytes do not depend on the rows, `row` counts bytes per row; tensor ranks divide the
    `split_*` ones.
    """

    fixed: Array
    split_fixed: Array
    row: Array
    split_row: Array


def peak_moments(model: LayerGraph, *, divided: bool) -> PeakMoments:
    """Collects the peak moments of all layers.

    `divided` selects those on one of several tensor ranks; otherwise one rank holds the whole
    layer.
    """
    found = [_of(layer, divided=divided) for layer in model.layers]
    padded = max(len(moments) for moments in found)

    def numbers(name: str) -> Array:
        table = np.zeros((padded, len(found)))
        for layer, moments in enumerate(found):
            table[: len(moments), layer] = [getattr(moment, name) for moment in moments]
        return table

    return PeakMoments(
        fixed=numbers("fixed"),
        split_fixed=numbers("split_fixed"),
        row=numbers("row"),
        split_row=numbers("split_row"),
    )


def _of(layer: Layer, *, divided: bool) -> tuple[Moment, ...]:
    """Returns the moments of a layer.

    A layer that states none has one, its workspace, of which tensor ranks divide the same share as
    of its saved bytes.
    """
    tensor = layer.along("tensor")
    if divided and tensor.moments:
        return tensor.moments
    if layer.moments:
        return layer.moments
    split = layer.workspace_bytes * (
        tensor.saved_bytes / layer.saved_bytes if layer.saved_bytes else 0.0
    )
    return (Moment(row=layer.workspace_bytes - split, split_row=split),)


def temporary_bytes(moments: PeakMoments, tensor: int, rows: int) -> Array:
    """Returns the temporary bytes of every layer at its own peak moment, [layer]."""
    fixed = moments.fixed + moments.split_fixed / tensor
    row = moments.row + moments.split_row / tensor
    worst: Array = np.max(fixed + row * rows, axis=0)
    return np.maximum(worst, 0.0)


class RangeMaxima:
    """Looks up the maximum over any range [first, last) of an array in constant time.

    It is a sparse table: level k holds the maxima of 2**k neighbouring values.
    """

    def __init__(self, values: Array) -> None:
        levels = [values]
        while 2 ** len(levels) <= len(values):
            half = 2 ** (len(levels) - 1)
            levels.append(np.maximum(levels[-1][:-half], levels[-1][half:]))
        width = len(values)
        self._levels = np.array(
            [np.pad(level, (0, width - len(level)), constant_values=-np.inf) for level in levels]
        )

    def of(self, first: Ints, last: Ints) -> Any:
        """Returns the maximum of each range; no range may be empty."""
        level = np.log2(np.maximum(np.asarray(last) - first, 1)).astype(np.int64)
        return np.maximum(self._levels[level, first], self._levels[level, last - 2**level])

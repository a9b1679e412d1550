"""The worst moment of a stage's backward: which layer is at work, and what is still kept then.

When the backward of layer l begins, the layers after it have let go of what they kept, so that the
peak is max over l of kept(first..l) + temporaries(l), for any range of layers in constant time.
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
class Moments:
    """[moment, layer]: the numbers of every layer's moments, short lists filled with zeros."""

    fixed: Array
    split_fixed: Array
    row: Array
    split_row: Array


def moments_table(model: LayerGraph, *, divided: bool) -> Moments:
    """The moments of all layers on a rank that holds them alone, or is one of several."""
    found = [_of(layer, divided=divided) for layer in model.layers]
    padded = max(len(moments) for moments in found)

    def numbers(name: str) -> Array:
        table = np.zeros((padded, len(found)))
        for layer, moments in enumerate(found):
            table[: len(moments), layer] = [getattr(moment, name) for moment in moments]
        return table

    return Moments(
        fixed=numbers("fixed"),
        split_fixed=numbers("split_fixed"),
        row=numbers("row"),
        split_row=numbers("split_row"),
    )


def _of(layer: Layer, *, divided: bool) -> tuple[Moment, ...]:
    """Of a layer that does not tell its moments, as large a share of the workspace is divided as of
    what it keeps."""
    if divided and layer.tensor_moments:
        return layer.tensor_moments
    if layer.moments:
        return layer.moments
    split = layer.workspace_bytes * (
        layer.split_saved_bytes / layer.saved_bytes if layer.saved_bytes else 0.0
    )
    return (Moment(row=layer.workspace_bytes - split, split_row=split),)


def temporaries(moments: Moments, tensor: int, rows: int) -> Array:
    """Bytes [layer] beyond what is kept, at each layer's own worst moment."""
    fixed = moments.fixed + moments.split_fixed / tensor
    row = moments.row + moments.split_row / tensor
    worst: Array = np.max(fixed + row * rows, axis=0)
    return np.maximum(worst, 0.0)


class RangeMaxima:
    """Maxima over any ranges [first, last) of an array, each in constant time (a sparse table:
    level k holds the maximum of 2**k neighbours)."""

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
        """The largest value of each range, which must not be empty."""
        level = np.log2(np.maximum(np.asarray(last) - first, 1)).astype(np.int64)
        return np.maximum(self._levels[level, first], self._levels[level, last - 2**level])

"""Reads and writes the tiles of a tensor that ranks hold in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.layout.boxes import Box
from meshwright.layout.tiles import Tile, joined, joint


def box_index(box: Box) -> tuple[slice, ...]:
    """Returns the index of a box in a tensor."""
    return tuple(slice(first, last) for first, last in box)


def read_slices(full: Tensor, tile: Tile) -> Tensor:
    """Returns a tile of a full tensor as a new tensor, its boxes joined."""
    return torch.cat([full[box_index(box)] for box in tile], dim=joint(tile))


def write_slices(full: Tensor, tile: Tile, part: Tensor) -> None:
    """Writes a tile, as `read_slices` returns it, back into the full tensor."""
    for box, place in zip(tile, joined(tile), strict=True):
        full[box_index(box)].copy_(part[box_index(place)])

"""Lays out the gradients that are summed together in one flat buffer, whichever collective sums
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from meshwright.layout.boxes import Range
from meshwright.layout.shares import UNDIVIDED, Share
from meshwright.layout.tiles import Tile, shape_of, within
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.parameters import sums_gradient
from meshwright.runtime.slices import read_slices, write_slices

UNSHARED: GradientKey = (None, None)
"""Key of the gradients that this rank does not share with others."""


@dataclass(slots=True)
class SumGroup:
    """Holds the process group of the ranks that sum a tensor together."""

    group: ProcessGroup
    size: int


@dataclass(slots=True)
class TrainedPart:
    """Says which part of a parameter the optimizer of this rank updates."""

    of: LocalParameter
    parameter: nn.Parameter
    """The rank's tile of it, or a flat part of that."""
    span: Range
    """The elements of the tile, counted in row-major order."""


@dataclass(slots=True, eq=False)
class FlatBucket:
    """Holds gradients that are summed together: every `parameter.grad` is a view of `buffer`."""

    local_parameters: list[LocalParameter]
    buffer: Tensor
    undivided: int
    """Number of elements at the front that every tensor-parallel rank holds; the rest is divided
    among them."""
    own: Share
    """This rank's share of the divided parameters."""
    members: dict[Share | None, SumGroup]
    """The ranks that sum each share, keyed as in their instructions; empty if no other rank shares
    these gradients."""
    pending: set[str] = field(default_factory=set)
    """Names of the parameters whose gradients are not complete."""
    completing: bool = False
    """True if the last backward that adds to these gradients has begun."""
    queued: list[Instruction] = field(default_factory=list)
    """The all-reduces to be started when the gradients are complete."""
    with_gradient: set[str] = field(default_factory=set)
    """Names of the parameters that have received a gradient so far."""
    trained: list[TrainedPart] = field(init=False)
    """What the optimizer of this rank updates: its parameters, or its share of them."""
    norm_terms: list[tuple[Tensor, int]] = field(init=False)
    """The summed gradients that this rank adds to the norm, each with the number of ranks that do
    so."""
    _tiles: dict[Share, list[tuple[int, Tile]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = [
            TrainedPart(one, one.parameter, (0, one.parameter.numel()))
            for one in self.local_parameters
        ]
        parts = self.buffer[: self.undivided], self.buffer[self.undivided :]
        self.norm_terms = [*zip(parts, self.copies, strict=True)]

    @property
    def copies(self) -> tuple[int, int]:
        """Returns how many ranks hold each undivided element, and how many hold each divided
        one."""
        if not self.members or None in self.members:
            replicas = self.members[None].size if self.members else 1
            return replicas * self.own.of, replicas
        sizes = {share == UNDIVIDED: members.size for share, members in self.members.items()}
        return sizes.get(True, 1), sizes.get(False, 1)

    def tiles(self, share: Share) -> Sequence[tuple[int, Tile]]:
        """Lists where a share lies: the index of a parameter, and a tile of what this rank holds of
        it."""
        if share not in self._tiles:
            self._tiles[share] = [
                (index, within(one.tile, one.of.tile(share)))
                for index, one in enumerate(self.local_parameters)
                if (one.of.split is None) == (share == UNDIVIDED)
            ]
        return self._tiles[share]


def group_parameters(
    held: Sequence[LocalParameter], reductions: Sequence[Instruction]
) -> dict[GradientKey, list[LocalParameter]]:
    """Assigns each of a rank's trainable parameters to the instruction that reduces its
    gradient."""
    groups: dict[GradientKey, list[LocalParameter]] = {(i.layers, i.tied): [] for i in reductions}
    for one in held:
        if not one.parameter.requires_grad:
            continue
        keys = [(i.layers, i.tied) for i in reductions if sums_gradient(i, one.of)]
        groups.setdefault(keys[0] if keys else UNSHARED, []).append(one)
    return groups


def make_bucket(
    held: Sequence[LocalParameter], own: Share, members: dict[Share | None, SumGroup]
) -> FlatBucket:
    """Lays out the gradients of some parameters in one buffer, those of undivided parameters
    first."""
    ordered = sorted(held, key=lambda one: one.of.split is not None)
    parameters = [one.parameter for one in ordered]
    total = sum(p.numel() for p in parameters)
    buffer = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = buffer[start : start + parameter.numel()]
        parameter.grad = view.view(parameter.shape)
        start += parameter.numel()
    undivided = sum(one.parameter.numel() for one in ordered if one.of.split is None)
    return FlatBucket(
        local_parameters=ordered, buffer=buffer, undivided=undivided, own=own, members=members
    )


def gather_tile(bucket: FlatBucket, share: Share, tensors: Sequence[Tensor]) -> Tensor:
    """Copies one share of each of the bucket's parameters (or of `tensors` like them) into a flat
    tensor, in the order in which a rank that has only this share holds it."""
    return torch.cat([read_slices(tensors[k], tile).flatten() for k, tile in bucket.tiles(share)])


def scatter_tile(bucket: FlatBucket, share: Share, flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes a share back to where `gather_tile` has taken it from."""
    start = 0
    for k, tile in bucket.tiles(share):
        shape = shape_of(tile)
        end = start + prod(shape)
        write_slices(tensors[k], tile, flat[start:end].view(shape))
        start = end

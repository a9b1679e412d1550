"""Lists the parameters of a model, with which part of each every rank of a plan holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from meshwright.layout.boxes import elements, run_of_elements
from meshwright.layout.shares import Share, flat_share, own_share
from meshwright.layout.tiles import Layout, Tile, placed, shape_of
from meshwright.model.graph import LayeredModel
from meshwright.model.shard import Split, divided_dim, splits, tile_of
from meshwright.plan.ranks import StagePlacement, holders_of
from meshwright.program.instructions import Instruction
from meshwright.records import record


@record
class Parameter:
    """Describes a whole parameter of the model."""

    name: str
    """Name in the model, such as `blocks.0.attention.output.weight`; the first, if it is tied."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    layers: tuple[int, ...]
    """Numbers of the layers that use it, ascending."""
    split: Split | None
    """How tensor parallelism divides it; None if every rank holds all of it."""

    def tile(self, share: Share) -> Tile:
        """Returns the part of this parameter that a share covers: all of it if it is not
        divided."""
        return tile_of(self.split, self.name.rpartition(".")[2], self.shape, share)


def parameters_of(model: nn.Module, layered: LayeredModel) -> dict[str, Parameter]:
    """Lists the parameters by name, in the order of layers. Needs the whole model, before it is
    divided."""
    table = splits(model, tuple(name for part in layered.layers for name in part.modules))
    users: dict[str, list[int]] = {}
    for number, part in enumerate(layered.layers):
        for name in dict.fromkeys(part.parameters.values()):
            users.setdefault(name, []).append(number)
    found = {}
    for name, layers in users.items():
        parameter = model.get_parameter(name)
        module, _, attribute = name.rpartition(".")
        split = table.get(module)
        found[name] = Parameter(
            name=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            trained=parameter.requires_grad,
            layers=tuple(layers),
            split=None if divided_dim(split, attribute) is None else split,
        )
    return found


def layout_of(parameter: Parameter, stages: Sequence[StagePlacement]) -> Layout:
    """Returns the tile of a parameter that each of its ranks holds, those of its first replica
    first."""
    return {
        rank: parameter.tile(own_share(len(group), index))
        for group in holders_of(stages, parameter.layers).groups("tensor")
        for index, rank in enumerate(group)
    }


def sums_gradient(i: Instruction, parameter: Parameter) -> bool:
    """True if an instruction that sums gradients sums that of a parameter."""
    if len(parameter.layers) > 1:
        return i.tied == parameter.name
    return i.layers is not None and i.layers[0] <= parameter.layers[0] < i.layers[1]


def states_layout(
    parameter: Parameter,
    others: Iterable[Parameter],
    stages: Sequence[StagePlacement],
    scattering: Sequence[Sequence[Instruction]],
) -> Layout:
    """Returns the boxes of a trained parameter whose optimizer states each of its ranks holds.

    `others` are all parameters of the model, and `scattering` are each rank's instructions that
    leave it a flat share of the gradients that they sum.
    """
    found = {}
    for group in holders_of(stages, parameter.layers).groups("tensor"):
        for index, rank in enumerate(group):
            share = own_share(len(group), index)
            found[rank] = tile = parameter.tile(share)
            for i in scattering[rank]:
                if sums_gradient(i, parameter):
                    summed = [each for each in others if each.trained and sums_gradient(i, each)]
                    summed.sort(key=lambda each: each.split is not None)
                    sizes = [sum(map(elements, each.tile(share))) for each in summed]
                    spans = flat_share(sizes, len(i.ranks), i.ranks.index(rank))
                    span = spans[summed.index(parameter)]
                    local = run_of_elements(shape_of(tile), *span)
                    found[rank] = tuple(box for each in local for box, _ in placed(tile, each))
    return found

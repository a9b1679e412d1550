"""Divides the optimizer states that a device holds among those that hold the same layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from meshwright.cost.memory import Adjustment, StageMemory, memory_tables
from meshwright.cost.weights import Array, cumulative, tied_share, untied_parameters
from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import mesh_of, stacked
from meshwright.plan.ranks import RankView
from meshwright.plan.spec import Plan
from meshwright.techniques.state_division.plan import divided_layers, divides


def adjustment(plan: Plan, model: LayerGraph) -> Adjustment | None:
    """Returns a function that leaves to each rank its share of the optimizer states of divided
    layers; None if no stage divides its states."""
    if not any(map(divides, plan.stages)):
        return None
    table = memory_tables(model, plan.job).plain.weights
    divided = divided_layers(plan, model)
    replicas = np.zeros(len(model.layers))
    for stage in plan.stages:
        replicas[slice(*stage.layers)] += mesh_of(stage).width("data")
    # Share of a layer's states that other ranks hold instead of one that holds the layer.
    away = np.where(divided, 1 - 1 / replicas, 0.0)
    of_tied = [
        1 - 1 / _replicas(plan, tied.layers) if all(divided[n] for n in tied.layers) else 0.0
        for tied in model.tied
    ]

    @cache
    def elsewhere(tensor: int) -> Array:
        """Returns, cumulative over layers, the number of a rank's parameters that other ranks
        update, by tensor width."""
        layers = np.arange(len(model.layers))
        return cumulative(untied_parameters(table.trained, (layers, layers + 1), tensor) * away)

    def adjust(parts: StageMemory, rank: RankView) -> StageMemory:
        tensor = rank.placement.width("tensor")
        ranges = [stage.layers for stage in rank.stages]
        others = sum(float(elsewhere(tensor)[b] - elsewhere(tensor)[a]) for a, b in ranges)
        for uses, part in zip(table.tied, of_tied, strict=True):
            if any(uses.users[b] > uses.users[a] for a, b in ranges):
                others += tied_share(uses, uses.trained, tensor) * part
        return replace(parts, optimizer=parts.optimizer - others * table.unit.optimizer)

    return adjust


def _replicas(plan: Plan, layers: Sequence[int]) -> int:
    """Returns the number of replicas that hold any of some layers."""
    held = (s for s in plan.stages if any(s.layers[0] <= n < s.layers[1] for n in layers))
    return stacked(map(mesh_of, held)).width("data")

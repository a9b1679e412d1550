"""Divides the optimizer states that a device holds among those that hold the same layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.cost.memory import StageMemory, memory_tables
from meshwright.cost.weights import own_numbers, share
from meshwright.plan.ranks import RankView
from meshwright.techniques.state_division.plan import divides, holders


def adjust(parts: StageMemory, rank: RankView) -> StageMemory:
    """Leave of the optimizer states of divided layers the share of this rank."""
    if not any(divides(stage.of_plan) for stage in rank.stages):
        return parts
    table = memory_tables(rank.model, rank.plan.job).plain.weights
    tensor = len(rank.stages[0].seats[rank.seat.replica])
    others = 0.0
    for stage in rank.stages:
        for layer in range(*stage.layers):
            own = float(own_numbers(table.trained, (layer, layer + 1), tensor))
            others += own * _share_of_others(rank, (layer,))
    for tied, uses in zip(rank.model.tied, table.tied, strict=True):
        if any(a <= layer < b for layer in tied.layers for a, b in (s.layers for s in rank.stages)):
            others += share(uses, uses.trained, tensor) * _share_of_others(rank, tied.layers)
    return replace(parts, optimizer=parts.optimizer - others * table.unit.optimizer)


def _share_of_others(rank: RankView, layers: Sequence[int]) -> float:
    """Return the share of the states of some layers that other ranks hold instead of this one."""
    held = holders(rank.plan, layers)
    if not all(map(divides, held)):
        return 0.0
    replicas = {replica for stage in held for replica in stage.devices}
    return 1 - 1 / len(replicas)

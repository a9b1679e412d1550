"""Frozen weights before the first step: all who hold one take the values of the first of them.

Trained ones do so by the groups that sum their gradients; frozen ones have none of their own, and
are passed on from rank to rank where no such group has just these members.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.model.graph import LayeredModel
from meshwright.model.shard import (
    UNDIVIDED,
    Ranges,
    Tile,
    common_tiles,
    holder,
    own_tile,
    slices,
    splits,
    within,
)
from meshwright.plan.ranks import StageSeats
from meshwright.program.buckets import Ranks, replicas_of
from meshwright.records import record
from meshwright.runtime.build import Held
from meshwright.runtime.tensor import put, take
from meshwright.runtime.world import World


@record
class FrozenShare:
    """What several ranks hold alike of a frozen parameter."""

    name: str
    ranks: Ranks
    """Ascending; the first one's values are everybody's."""
    tile: Tile | None
    """None: all that each of them holds."""


def frozen_shares(
    model: nn.Module, layered: LayeredModel, stages: Sequence[StageSeats]
) -> tuple[FrozenShare, ...]:
    """Of every frozen parameter, in one order for all ranks. The model must not be divided yet."""
    users: dict[str, list[int]] = {}
    divided: set[str] = set()
    for number, part in enumerate(layered.layers):
        table = splits(model, part.modules)
        for local, name in part.parameters.items():
            parameter = model.get_parameter(name)
            if parameter.requires_grad:
                continue
            users.setdefault(name, []).append(number)
            module, _, own = local.rpartition(".")
            if module in table and slices(
                table[module], own, tuple(parameter.shape), own_tile(2, 0)
            ):
                divided.add(name)
    return tuple(
        FrozenShare(name=name, ranks=ranks, tile=tile)
        for name, layers in users.items()
        for ranks, tile in _alike(replicas_of(stages, layers), name in divided)
        if len(ranks) > 1
    )


def _alike(replicas: Sequence[Ranks], divided: bool) -> Iterator[tuple[Ranks, Tile | None]]:
    """Ranks of replicas that hold the same, as they would sum its gradient."""
    widths = {len(replica) for replica in replicas}
    if len(widths) == 1:
        for group in zip(*replicas, strict=True):
            yield tuple(sorted(group)), None
    elif not divided:
        yield tuple(sorted(rank for replica in replicas for rank in replica)), UNDIVIDED
    else:
        for tile in common_tiles(widths):
            yield tuple(sorted(r[holder(tile, len(r))] for r in replicas)), tile


@torch.no_grad()
def equalise_frozen(
    shares: Sequence[FrozenShare], held: Sequence[Held], own: Tile, world: World
) -> None:
    """Every rank calls it, with what it holds; `own` is its share of what tensor ranks divide."""
    by_name = {one.name: one for one in held}
    for each in shares:
        if world.rank in each.ranks:
            one = by_name[each.name]
            weight, place = one.parameter.detach(), _place(one, own, each.tile)
            piece = (weight if place is None else take(weight, place)).contiguous()
            _pass_on(piece, each.ranks, world)
            if place is not None:
                put(weight, place, piece)
            elif piece.data_ptr() != weight.data_ptr():
                weight.copy_(piece)


def _place(one: Held, own: Tile, tile: Tile | None) -> Ranges | None:
    """Where a tile lies in what this rank holds; None: it is all of that."""
    if tile is None or tile == UNDIVIDED:
        return None
    whole, part = one.slices(own), one.slices(tile)
    assert whole is not None
    assert part is not None
    return within(whole, part)


def _pass_on(piece: Tensor, ranks: Ranks, world: World) -> None:
    """From each rank to the next one."""
    if ranks in world.reduce:
        dist.broadcast(piece, group_src=0, group=world.reduce[ranks])
        return
    at = ranks.index(world.rank)
    if at > 0:
        dist.recv(piece, ranks[at - 1], group=world.forward)
    if at + 1 < len(ranks):
        dist.send(piece, ranks[at + 1], group=world.forward)

"""Gives frozen (untrained) parameters equal values on all ranks that hold them, before the first
step.

Trained parameters are broadcast in the process groups that sum their gradients. A frozen one uses
such a group if one happens to have exactly its holders; otherwise its values are passed on from
rank to rank.
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
from meshwright.plan.ranks import Ranks, StageSeats, replicas_of
from meshwright.records import record
from meshwright.runtime.build import Held
from meshwright.runtime.tensor import put, take
from meshwright.runtime.world import World


@record
class FrozenShare:
    """A frozen parameter, or a tile of it, of which several ranks hold a copy."""

    name: str
    ranks: Ranks
    """The holders, ascending; all of them take the first one's values."""
    tile: Tile | None
    """The tile; None: all that each holder has."""


def frozen_shares(
    model: nn.Module, layered: LayeredModel, stages: Sequence[StageSeats]
) -> tuple[FrozenShare, ...]:
    """Lists the copies of every frozen parameter, in the same order on all ranks. Needs the whole
    model, before it is divided."""
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
    """Yields the groups of ranks that hold equal values: those that would sum its gradient if it
    were trained."""
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
    """Copies each frozen parameter from its first holder to the others. Every rank must call it,
    with the parameters that it holds and its own tile of those that tensor parallelism divides."""
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
    """Returns where a tile lies within this rank's part of a parameter; None if it is all of that
    part."""
    if tile is None or tile == UNDIVIDED:
        return None
    whole, part = one.slices(own), one.slices(tile)
    assert whole is not None
    assert part is not None
    return within(whole, part)


def _pass_on(piece: Tensor, ranks: Ranks, world: World) -> None:
    """Copies `piece` from the first rank to the others: by broadcast if they have a group, else
    each rank sends it to the next."""
    if ranks in world.reduce:
        dist.broadcast(piece, group_src=0, group=world.reduce[ranks])
        return
    at = ranks.index(world.rank)
    if at > 0:
        dist.recv(piece, ranks[at - 1], group=world.forward)
    if at + 1 < len(ranks):
        dist.send(piece, ranks[at + 1], group=world.forward)

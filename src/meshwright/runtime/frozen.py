"""Gives frozen (untrained) parameters equal values on all ranks that hold them, before the first
step.

Trained parameters are broadcast in the process groups that sum their gradients. A frozen one uses
such a group if one happens to have exactly its holders; otherwise its values are passed on from
rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.layout.shares import UNDIVIDED, Share
from meshwright.layout.tiles import within
from meshwright.plan.ranks import StageSeats
from meshwright.program.buckets import Ranks, copies_of, replicas_of
from meshwright.records import record
from meshwright.runtime.build import Held
from meshwright.runtime.parameters import Parameter
from meshwright.runtime.tensor import put, take
from meshwright.runtime.world import World


@record
class FrozenShare:
    """A frozen parameter, or a share of it, of which several ranks hold a copy."""

    name: str
    ranks: Ranks
    """The holders, ascending; all of them take the first one's values."""
    share: Share | None
    """What is alike: a share of a divided parameter; else all that each holder has."""


def frozen_shares(
    parameters: Iterable[Parameter], stages: Sequence[StageSeats]
) -> tuple[FrozenShare, ...]:
    """Lists the copies of every frozen parameter, in the same order on all ranks."""
    return tuple(
        FrozenShare(name=each.name, ranks=ranks, share=share)
        for each in parameters
        if not each.trained
        for ranks, share in copies_of(replicas_of(stages, each.layers))
        if len(ranks) > 1 and (share is None or (share == UNDIVIDED) == (each.split is None))
    )


@torch.no_grad()
def equalise_frozen(shares: Sequence[FrozenShare], held: Sequence[Held], world: World) -> None:
    """Copies each frozen parameter from its first holder to the others. Every rank must call it,
    with the parameters that it holds."""
    by_name = {one.name: one for one in held}
    for each in shares:
        if world.rank in each.ranks:
            one = by_name[each.name]
            weight = one.parameter.detach()
            if each.share in (None, UNDIVIDED):
                piece = weight.contiguous()
                _pass_on(piece, each.ranks, world)
                if piece.data_ptr() != weight.data_ptr():
                    weight.copy_(piece)
            else:
                place = within(one.tile, one.of.tile(each.share))
                piece = take(weight, place)
                _pass_on(piece, each.ranks, world)
                put(weight, place, piece)


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

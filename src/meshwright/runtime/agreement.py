"""Makes all ranks agree, before the first step, on the messages that they will exchange and on the
initial weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.errors import Problem, TrainingError
from meshwright.layout.shares import UNDIVIDED
from meshwright.layout.tiles import within
from meshwright.plan.mesh import copies
from meshwright.plan.ranks import StagePlacement, holders_of
from meshwright.program.instructions import Program
from meshwright.program.operations import MATCHING_RECEIVE, Op
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.parameters import Parameter
from meshwright.runtime.seeds import hash_seed
from meshwright.runtime.slices import read_slices, write_slices
from meshwright.runtime.world import World
from meshwright.techniques.pipeline_parallel.runtime import BoundaryMessages


def agree_on_messages(
    program: Program, world: World, messages: Mapping[int, dict[Op, BoundaryMessages]]
) -> None:
    """Exchanges a description of the coming messages between every pair of ranks that will exchange
    some.

    This opens the connections in an order that is the same for all ranks (two ranks open their NCCL
    connection in their first message, both at once). It also finds processes whose models differ,
    whose messages would otherwise be mistaken for others. `messages` are this rank's, keyed by
    stage and operation. Raises TrainingError.
    """
    pairs = sorted(
        {(i.op, i.stage, rank, i.peer) for rank, found in enumerate(program.ranks) for i in found
         if i.op.kind == "send" and i.peer is not None}
    )  # fmt: skip
    for op, stage, source, target in pairs:
        if world.rank not in (source, target):
            continue
        sends = world.rank == source
        end = messages[stage if sends else receiving_stage(op, stage)][
            op if sends else MATCHING_RECEIVE[op]
        ]
        own = torch.tensor([hash_seed(*end.signature())], device=world.device)
        if sends:
            dist.send(own, target, group=end.group)
            continue
        theirs = torch.empty_like(own)
        dist.recv(theirs, source, group=end.group)
        if not torch.equal(own, theirs):
            raise TrainingError(_disagreement(world.rank, op, source, end))

    for (_, ranks), group in world.chains.items():
        dist.broadcast(torch.zeros(1, device=world.device), ranks[0], group=group)


def _disagreement(rank: int, op: Op, source: int, end: BoundaryMessages) -> Problem:
    """Returns what is wrong where a rank expects other messages than its peer will send."""
    return Problem(
        f"rank {rank}",
        f"{op} from rank {source}",
        "tensors of other names, shapes or types than here",
        f"the same on both sides ({'; '.join(end.signature())})",
        "build the same model, with the same inputs, in every process",
    )


def receiving_stage(op: Op, stage: int) -> int:
    """Returns the stage that receives what a stage sends."""
    return stage + 1 if op is Op.SEND_F else stage - 1


@torch.no_grad()
def broadcast_parameters(
    parameters: Iterable[Parameter],
    stages: Sequence[StagePlacement],
    held: Sequence[LocalParameter],
    world: World,
) -> None:
    """Copies every parameter from its first holder to the others.

    Trained ones are broadcast in the process groups that sum their gradients, and frozen ones in
    such a group if one happens to have exactly their holders; otherwise they are passed on from
    rank to rank. Every rank must call it, with all parameters of the model in one order, and those
    that it holds.
    """
    own = {one.name: one for one in held}
    for each in parameters:
        for ranks, share in copies(holders_of(stages, each.layers)):
            other = share is not None and (share == UNDIVIDED) != (each.split is None)
            if other or len(ranks) == 1 or world.rank not in ranks:
                continue
            weight, tile = own[each.name].parameter, own[each.name].tile
            place = within(tile, tile if share in (None, UNDIVIDED) else each.tile(share))
            piece = read_slices(weight, place)
            _pass_on(piece, ranks, world)
            write_slices(weight, place, piece)
        if each.name in own and each.split is None:
            for group in world.inside.values():
                dist.broadcast(own[each.name].parameter, group_src=0, group=group)


def _pass_on(piece: Tensor, ranks: tuple[int, ...], world: World) -> None:
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

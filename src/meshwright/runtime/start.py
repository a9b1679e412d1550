"""Makes all ranks agree, before the first step, on the messages that they will exchange and on the
initial weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from meshwright.errors import Problem, TrainingError
from meshwright.program.instructions import Program
from meshwright.program.operations import MATCHING_RECEIVE, Op
from meshwright.runtime.boundary import Messages
from meshwright.runtime.build import Held
from meshwright.runtime.seeds import mix
from meshwright.runtime.tensor import Team
from meshwright.runtime.world import World
from meshwright.techniques.data_parallel.runtime import FlatBucket, gathered, scatter


def agree(program: Program, world: World, messages: Mapping[int, dict[Op, Messages]]) -> None:
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
        end = messages[stage if sends else receiver(op, stage)][
            op if sends else MATCHING_RECEIVE[op]
        ]
        own = torch.tensor([mix(*end.signature())], device=world.device)
        if sends:
            dist.send(own, target, group=end.group)
            continue
        theirs = torch.empty_like(own)
        dist.recv(theirs, source, group=end.group)
        if not torch.equal(own, theirs):
            raise TrainingError(
                Problem(
                    f"rank {world.rank}",
                    f"{op} from rank {source}",
                    "tensors of other names, shapes or types than here",
                    f"the same on both sides ({'; '.join(end.signature())})",
                    "build the same model, with the same inputs, in every process",
                )
            )

    for (_, ranks), group in world.chains.items():
        dist.broadcast(torch.zeros(1, device=world.device), ranks[0], group=group)


def receiver(op: Op, stage: int) -> int:
    """Returns the stage to which a stage sends."""
    return stage + 1 if op is Op.SEND_F else stage - 1


def equalise(
    buckets: Iterable[FlatBucket], held: Sequence[Held], world: World, team: Team | None
) -> None:
    """Copies every parameter from its first holder to the others."""
    with torch.no_grad():
        for bucket in buckets:
            weights = [one.parameter for one in bucket.held]
            for tile, members in bucket.members.items():
                if tile is None:
                    for weight in weights:
                        dist.broadcast(weight, group_src=0, group=members.group)
                else:
                    flat = gathered(bucket, tile, weights)
                    dist.broadcast(flat, group_src=0, group=members.group)
                    scatter(bucket, tile, flat, weights)
        for one in held if team is not None else ():
            if one.split is None:
                dist.broadcast(one.parameter, group_src=0, group=world.tensor)

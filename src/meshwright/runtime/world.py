"""Connects this process with the others of a run, and makes the groups in which they communicate.

Groups are built from a plan and its program, and handed to those who need them; nothing here is
global except torch.distributed's own default group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from meshwright.errors import LaunchError, Problem
from meshwright.plan.mesh import INNER_AXES, Axis
from meshwright.plan.ranks import rank_mesh, stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction, Program, format_instruction
from meshwright.program.messages import Chain, chain_of
from meshwright.runtime.failure import first_line, is_communication_error
from meshwright.runtime.heartbeat import Heartbeat
from meshwright.runtime.launch_variables import LOCAL_RANK, RANK, REQUIRED, WORLD_SIZE
from meshwright.runtime.rendezvous import PeerLost, join_run


@dataclass(slots=True)
class World:
    """Says which rank this process is, and holds the process groups in which it communicates."""

    rank: int
    size: int
    device: torch.device
    everyone: ProcessGroup
    forward: ProcessGroup
    """Group for activations, separate from `backward` so that the two directions never wait in one
    queue."""
    backward: ProcessGroup
    reduce: dict[tuple[int, ...], ProcessGroup] = field(default_factory=dict)
    """Groups that sum gradients, keyed by their ranks."""
    chains: dict[Chain, ProcessGroup] = field(default_factory=dict)
    """Groups for broadcasts over a stage boundary."""
    inside: dict[Axis, ProcessGroup] = field(default_factory=dict)
    """For each axis along which several ranks divide this rank's layers: these ranks."""
    heartbeat: Heartbeat | None = None
    """Heartbeat of the ranks; None for a single rank."""
    owned: bool = True
    """True if closing this World must end torch.distributed too."""


def launcher_ranks(plan: Plan, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns the rank and the local rank that a launcher gave this process.

    Raises LaunchError if its variables are missing or not numbers, or if there are not as many
    processes as the plan has devices.
    """
    size = len(plan.devices)
    mend = "call meshwright.launch(plan) at the start of your script, and run it with python"
    missing = [name for name in REQUIRED if name not in environ]
    if missing:
        raise LaunchError(
            Problem(
                "environment",
                ", ".join(missing),
                "nothing",
                "the variables that a launcher sets",
                mend,
            )
        )
    numbers = {}
    for name in (RANK, WORLD_SIZE, LOCAL_RANK):
        if not environ[name].isdecimal():
            raise LaunchError(Problem("environment", name, repr(environ[name]), "a whole number"))
        numbers[name] = int(environ[name])
    if numbers[WORLD_SIZE] != size:
        raise LaunchError(
            Problem(
                "environment",
                "WORLD_SIZE",
                f"{numbers[WORLD_SIZE]} processes",
                f"{size}, one for each device of plan {plan.name!r}",
                mend,
            )
        )
    return numbers[RANK], numbers[LOCAL_RANK]


def pick_device(local_rank: int, kind: str | None = None) -> torch.device:
    """Returns `cuda:LOCAL_RANK` if CUDA is available (unless `kind` is "cpu"), else the CPU.

    Raises LaunchError if this host has fewer CUDA devices than processes.
    """
    if kind == "cpu" or (kind is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise LaunchError(
            Problem(
                "environment",
                "LOCAL_RANK",
                f"{local_rank} with {count} CUDA devices here",
                "at most one process for each device",
                "lower --nproc-per-node on this host",
            )
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def connect(
    plan: Plan,
    program: Program,
    *,
    timeout_seconds: float,
    device: str | None = None,
    backend: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> World:
    """Connects with all other processes and builds every group that the program needs.

    A default group that exists already is used, and left alone at the end. `backend` carries the
    messages of all other groups; None: NCCL on CUDA devices, gloo on CPUs. Raises LaunchError.
    """
    timeout = timedelta(seconds=timeout_seconds)
    owned = not dist.is_initialized()
    if owned:
        rank, local_rank = launcher_ranks(plan, environ)
        chosen = pick_device(local_rank, device)
        join_run(rank, len(plan.devices), chosen, timeout, environ)
    else:
        rank = dist.get_rank()
        local_rank = int(environ.get("LOCAL_RANK", rank))
        chosen = pick_device(local_rank, device)
    _check_size(plan)
    carrier = backend or ("nccl" if chosen.type == "cuda" else "gloo")
    return _groups(plan, program, chosen, timeout, owned, carrier)


def close(world: World) -> None:
    """Stops the heartbeat and leaves all groups."""
    if world.heartbeat is not None:
        world.heartbeat.stop()
    if not dist.is_initialized():
        return
    if world.owned:
        dist.destroy_process_group()
        return
    shared = {world.forward, world.backward, *world.reduce.values(), *world.chains.values()}
    for group in shared - {world.everyone}:
        dist.destroy_process_group(group)
    for group in world.inside.values():
        dist.destroy_process_group(group)


def _check_size(plan: Plan) -> None:
    if dist.get_world_size() != len(plan.devices):
        raise LaunchError(
            Problem(
                "torch.distributed",
                "world size",
                f"{dist.get_world_size()} processes",
                f"{len(plan.devices)}, one for each device of plan {plan.name!r}",
            )
        )


def _groups(
    plan: Plan,
    program: Program,
    device: torch.device,
    timeout: timedelta,
    owned: bool,
    backend: str,
) -> World:
    """Creates all groups, in the same order on every rank, as torch.distributed demands."""

    def new(ranks: Iterable[int]) -> ProcessGroup:
        group = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        return cast("ProcessGroup", group)

    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(
        rank=rank,
        size=size,
        device=device,
        everyone=cast("ProcessGroup", dist.group.WORLD),
        forward=new(range(size)),
        backward=new(range(size)),
        owned=owned,
    )
    meshes = [rank_mesh(stage) for stage in stage_placements(plan)]
    for axis in INNER_AXES:
        for ranks in dict.fromkeys(ranks for mesh in meshes for ranks in mesh.groups(axis)):
            if len(ranks) > 1:
                group = new(ranks)
                if rank in ranks:
                    world.inside[axis] = group
    for ranks in reduction_groups(program):
        group = new(ranks)
        if rank in ranks:
            world.reduce[ranks] = group
    for chain in broadcast_groups(program):
        _, ranks = chain
        group = new(ranks)
        if rank in ranks:
            world.chains[chain] = group
    # Last, since creating groups uses the store too.
    world.heartbeat = Heartbeat(rank, size) if size > 1 else None
    return world


def broadcast_groups(program: Program) -> tuple[Chain, ...]:
    """Returns the distinct chains along which tensors are broadcast, in the order of first use."""
    return tuple(
        dict.fromkeys(
            chain_of(instruction)
            for instructions in program.ranks
            for instruction in instructions
            if instruction.op.kind == "send" and instruction.ranks
        )
    )


def reduction_groups(program: Program) -> tuple[tuple[int, ...], ...]:
    """Returns the distinct sets of ranks that sum gradients together, in the order of first use."""
    return tuple(
        dict.fromkeys(
            instruction.ranks
            for instructions in program.ranks
            for instruction in instructions
            if instruction.op.of_gradients
        )
    )


@contextmanager
def name_lost_peers(world: World, doing: Callable[[], Instruction | None]) -> Iterator[None]:
    """Turns a failure of communication in its `with` block into PeerLost, which names the
    instruction and the rank that has gone."""
    try:
        yield
    except RuntimeError as failure:
        if not is_communication_error(failure):
            raise
        raise _lost_peer(world, doing(), failure) from failure


def _lost_peer(world: World, doing: Instruction | None, failure: RuntimeError) -> PeerLost:
    if doing is not None and doing.peer is not None:
        whom = f"rank {doing.peer}"
    else:
        known = doing.ranks if doing is not None and doing.ranks else range(world.size)
        others = [str(r) for r in known if r != world.rank]
        whom = f"one of ranks {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}"
    where = "between steps" if doing is None else format_instruction(doing)
    noticed = f"noticed by rank {world.rank}, at {where}: {first_line(failure)[:160]}"
    if world.heartbeat is not None:
        gone, noticed = world.heartbeat.lost_ranks(noticed)
        if gone:
            whom = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
    verb = "have" if whom.startswith("ranks") else "has"
    return PeerLost(
        Problem(
            whom,
            "",
            f"{verb} gone or stopped answering ({noticed})",
            "every rank alive to the end",
            "look for the first failure among the other ranks' logs",
        )
    )

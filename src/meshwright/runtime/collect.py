"""Collects every parameter on rank 0, put together from the slices that ranks hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.model.graph import LayeredModel
from meshwright.model.shard import Ranges, held, splits
from meshwright.plan.ranks import StageSeats
from meshwright.records import record
from meshwright.runtime.tensor import put
from meshwright.runtime.world import World


@record
class Home:
    """The ranks from which a whole parameter can be collected."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shares: tuple[tuple[int, Ranges | None], ...]
    """(Rank, slices that it holds) for the ranks that together hold the parameter; None for the
    slices: all of it."""


def parameter_homes(
    model: nn.Module, layered: LayeredModel, stages: tuple[StageSeats, ...]
) -> tuple[Home, ...]:
    """Finds the first replica that holds each parameter. Needs the whole model, before it is
    divided."""
    homes: dict[str, Home] = {}
    for number, part in enumerate(layered.layers):
        seats = next(s for s in stages if s.layers[0] <= number < s.layers[1]).seats[0]
        table = splits(model, part.modules)
        for local, name in part.parameters.items():
            parameter = model.get_parameter(name)
            module, _, attribute = local.rpartition(".")
            shares: list[tuple[int, Ranges | None]] = []
            for seat in seats:
                ranges = None
                if module in table and len(seats) > 1:
                    shape, width = tuple(parameter.shape), len(seats)
                    ranges = held(table[module], attribute, shape, width, seat.tensor_index)
                shares.append((seat.rank, ranges))
            whole = shares[0][1] is None
            homes.setdefault(
                name,
                Home(
                    name=name,
                    shape=tuple(parameter.shape),
                    dtype=parameter.dtype,
                    shares=tuple(shares[:1] if whole else shares),
                ),
            )
    return tuple(homes.values())


def collect_parameters(
    homes: tuple[Home, ...], own: dict[str, nn.Parameter], world: World
) -> dict[str, Tensor] | None:
    """Collects whole parameters on the CPU of rank 0, one parameter at a time; returns None on the
    other ranks."""
    result: dict[str, Tensor] = {}
    for home in homes:
        whole = torch.empty(home.shape, dtype=home.dtype) if world.rank == 0 else None
        for rank, ranges in home.shares:
            if world.rank not in (0, rank):
                continue
            part = own[home.name].detach() if world.rank == rank else _buffer(home, ranges, world)
            if rank != 0 and world.rank == rank:
                dist.send(part.contiguous(), 0, group=world.forward)
            elif rank != 0:
                dist.recv(part, rank, group=world.forward)
            if whole is not None and ranges is None:
                whole.copy_(part)
            elif whole is not None and ranges is not None:
                put(whole, ranges, part)
        if whole is not None:
            result[home.name] = whole
    return result if world.rank == 0 else None


def _buffer(home: Home, ranges: Ranges | None, world: World) -> Tensor:
    shape = list(home.shape)
    if ranges is not None:
        shape[ranges.dim] = sum(last - first for first, last in ranges.ranges)
    return torch.empty(shape, dtype=home.dtype, device=world.device)

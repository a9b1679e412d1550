"""Exchanges small records between ranks, as JSON: nothing is unpickled."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from meshwright.errors import TrainingError
from meshwright.records import parse, plain

T = TypeVar("T")


def broadcast_record(
    rank: int, value: T | None, kind: type[T], group: ProcessGroup | None = None
) -> T:
    """Broadcasts one rank's value and returns it on all ranks; the `value` of the others is
    ignored.

    Raises TrainingError if what arrives is not of type `kind`.
    """
    own = _to_bytes(value) if dist.get_rank(group) == rank else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([own.numel()])
    dist.broadcast(size, group=group, group_src=rank)
    data = own if dist.get_rank(group) == rank else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=rank)
    return _from_bytes(data, kind, f"rank {rank}")


def all_gather_records(value: T, kind: type[T], group: ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks, in rank order, on every rank. Raises TrainingError as
    `broadcast_record`."""
    own, sizes = _to_bytes(value), _sizes(value, group)
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: own.numel()] = own
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return _cut(found, sizes, kind)


def gather_records(value: T, kind: type[T], group: ProcessGroup | None = None) -> list[T] | None:
    """Returns the values of all ranks, in rank order, on the first; None on the others. Raises
    TrainingError as `broadcast_record`."""
    own, sizes = _to_bytes(value), _sizes(value, group)
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: own.numel()] = own
    first = dist.get_rank(group) == 0
    found = [torch.empty_like(padded) for _ in sizes] if first else None
    dist.gather(padded, found, group=group, group_dst=0)
    return None if found is None else _cut(found, sizes, kind)


def _sizes(value: object, group: ProcessGroup | None) -> list[int]:
    own = torch.tensor([_to_bytes(value).numel()])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(each) for each in found]


def _cut(found: list[Tensor], sizes: list[int], kind: type[T]) -> list[T]:
    return [
        _from_bytes(each[:size], kind, f"rank {rank}")
        for rank, (each, size) in enumerate(zip(found, sizes, strict=True))
    ]


def _to_bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(plain(value)).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor, kind: type[T], source: str) -> T:
    said: Any = json.loads(data.numpy().tobytes())
    return parse(said, kind, source=source, error=TrainingError)

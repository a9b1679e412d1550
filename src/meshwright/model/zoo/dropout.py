"""Drops attention weights at random; the tensor-parallel ranks that share the heads of a layer draw
differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_APART = 0x9E3779B97F4A7C15
"""Distance of the seeds of neighbouring ranks: 2^64 divided by the golden ratio."""


def drop(x: Tensor, probability: float, tensor_rank: int | None = None) -> Tensor:
    """Sets each element to 0 with this probability and divides the others by 1 - probability.

    For the backward only a mask of one byte per element is saved, on every kind of device.
    """
    if not probability:
        return x
    with own_draws(x.device, tensor_rank):
        return torch.native_dropout(x, probability, True)[0]


@contextmanager
def own_draws(device: torch.device, tensor_rank: int | None) -> Iterator[None]:
    """Draws random numbers from a seed of the tensor-parallel rank's own, and then lets the
    generator go on as it was on all ranks; does nothing if the rank is None.

    All ranks seed the generator alike before each layer, since what they all hold in full must be
    dropped alike. Heads that only one of them holds must not.
    """
    if tensor_rank is None:
        yield
        return
    on_cuda = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_cuda else torch.default_generator
    seed = generator.initial_seed()
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        generator.manual_seed((seed ^ (tensor_rank + 1) * _APART) & (2**63 - 1))
        yield

"""Seeds that depend on what is drawn for, never on the plan: (layer, step, row), not rank."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import torch


@lru_cache(maxsize=4096)
def mix(*parts: int | str) -> int:
    """A seed of 63 bits made of all parts."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def layer_seed(seed: int, step: int, layer: str, first_row: int) -> int:
    """Seed of a layer's forward (dropout) over rows of the global batch that begin at `first_row`.

    Plans with the same slices of rows draw the same masks, whichever ranks hold them.
    """
    return mix(seed, layer) ^ mix(step, first_row)


def initial_seed(seed: int, module: str) -> int:
    """Seed of the initial values of a module."""
    return mix(seed, "parameters", module)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator

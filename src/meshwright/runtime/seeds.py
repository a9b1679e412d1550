"""Seeds that depend on what is drawn for, never on the plan: (layer, step, row), not rank."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import torch

_WORD = 2**64 - 1


@lru_cache(maxsize=4096)
def mix(*parts: int | str) -> int:
    """A seed of 63 bits made of all parts."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def layer_seed(seed: int, layer: str) -> int:
    """The part of a layer in the seed of its forward (dropout): xor that of the rows."""
    return mix(seed, layer)


def rows_seed(step: int, first_row: int) -> int:
    """The part of the rows of the global batch that begin at `first_row`.

    Plans with the same slices of rows draw the same masks, whichever ranks hold them. It is asked
    for in every forward, so it is arithmetic: SplitMix64 (Steele et al. 2014).
    """
    x = ((step << 32) + first_row + 1) * 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return (x ^ x >> 31) >> 1


def initial_seed(seed: int, module: str) -> int:
    """Seed of the initial values of a module."""
    return mix(seed, "parameters", module)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator

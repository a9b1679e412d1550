"""Derives random seeds from what is drawn (layer, step, first row), never from the rank that
draws."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import torch

_WORD = 2**64 - 1


@lru_cache(maxsize=4096)
def hash_seed(*parts: int | str) -> int:
    """Hashes all parts to a seed of 63 bits."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def layer_seed(seed: int, layer: str) -> int:
    """Returns the layer's part of the seed of a forward (dropout). The seed is layer_seed xor
    rows_seed."""
    return hash_seed(seed, layer)


def rows_seed(step: int, first_row: int) -> int:
    """Returns the part of that seed for rows of the global batch that begin at `first_row`.

    Plans with the same slices of rows draw the same masks, whichever ranks hold them. Every forward
    calls this, so it is plain arithmetic: SplitMix64 (Steele et al. 2014).
    """
    x = ((step << 32) + first_row + 1) * 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return (x ^ x >> 31) >> 1


def initial_seed(seed: int, module: str) -> int:
    """Returns the seed of a module's initial values."""
    return hash_seed(seed, "parameters", module)


def generator_of(device: torch.device) -> torch.Generator:
    """Returns the generator that torch draws from on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator

"""What a layer is found to need when it is counted: modules and their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split
from meshwright.model.transformer.spec import Norm

INDEX = 8
"""Bytes of a token index."""


@dataclass(slots=True)
class Parameter:
    """One parameter that a layer has."""

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    linear: bool = False
    """Cast once a step in low precision."""
    trained: bool = True


@dataclass(slots=True)
class Made:
    """A module that a layer needs."""

    kind: Literal["linear", "table", "sines", "row", "norm", "experts", "convolution", "loss"]
    sizes: tuple[int, ...] = ()
    bias: bool = False
    split: Split | None = None
    norm: Norm | None = None
    model: LanguageModel | None = None

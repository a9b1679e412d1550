"""Specifications of the parameters and modules of a layer, collected when the layer is counted.

`model.zoo.described` builds torch modules from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split
from meshwright.model.transformer.spec import Norm

INDEX_BYTES = 8
"""Number of bytes of a token index."""


@dataclass(slots=True)
class ParameterSpec:
    """Gives the name and shape of one parameter of a layer, and how tensor parallelism divides
    it."""

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    linear: bool = False
    """True if 16-bit precision casts it once a step, as it does weights of linear maps."""
    trained: bool = True


@dataclass(slots=True)
class ModuleSpec:
    """Gives the kind and sizes of one module of a layer, and how tensor parallelism divides it."""

    kind: Literal["linear", "table", "sines", "row", "norm", "experts", "convolution", "loss"]
    sizes: tuple[int, ...] = ()
    """Arguments of the module's constructor, such as (inputs, outputs) of a linear map."""
    bias: bool = False
    split: Split | None = None
    norm: Norm | None = None
    model: LanguageModel | None = None

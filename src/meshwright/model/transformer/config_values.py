"""Reads values that several families have in common: activations, and the features of a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.errors import ModelError, Problem
from meshwright.model.transformer.spec import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "quick_gelu": "quick-gelu",
    "relu": "relu",
    "relu2": "relu-squared",
}


def read_activation(word: str, field: str, source: str) -> Activation:
    """Gives the activation that a config calls `word`. Raises ModelError if there is none."""
    if word not in ACTIVATIONS:
        wanted = f"one of {', '.join(ACTIVATIONS)}"
        raise ModelError(Problem(source, field, repr(word), wanted))
    return ACTIVATIONS[word]


def head_features(width: int, heads: int, names: tuple[str, str], source: str) -> int:
    """Gives the number of features of a head, width / heads. Raises ModelError with a remainder."""
    if width % heads:
        wanted = f"a divisor of {names[0]} = {width}"
        raise ModelError(Problem(source, names[1], str(heads), wanted))
    return width // heads


def rotated_share(table: Mapping[str, Any] | None, usual: float) -> float:
    """Gives the fraction of a head's features that is rotated."""
    given = (table or {}).get("partial_rotary_factor")
    return float(given) if isinstance(given, int | float) and 0 < given <= 1 else usual

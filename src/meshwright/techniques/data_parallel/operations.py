"""Defines the operation that data parallelism adds to programs."""

from __future__ import annotations

from meshwright.program.operations import OF_LAYERS, Op

REDUCE_GRAD = Op(
    "REDUCE_GRAD", "collective", "reduce", "reductions",
    of_gradients=True, meets=OF_LAYERS, named_by_layers=True,
)  # fmt: skip
"""Sum the gradients of some layers over every rank that holds them."""

OPERATIONS = (REDUCE_GRAD,)

"""Defines the operations that divided optimizer states add to programs."""

from __future__ import annotations

from meshwright.program.operations import OF_LAYERS, Op

REDUCE_SCATTER = Op(
    "REDUCE_SCATTER", "collective", "reduce", "reductions",
    of_gradients=True, scatters=True, meets=OF_LAYERS, named_by_layers=True,
)  # fmt: skip
"""Sum the gradients of some layers over every rank that holds them; each keeps its share."""
GATHER_PARAMETERS = Op(
    "GATHER_PARAMETERS", "collective", "reduce", "reductions",
    meets=OF_LAYERS, ends_step=True, named_by_layers=True,
)  # fmt: skip
"""Give every rank that holds some layers the weights that the others have updated."""

OPERATIONS = (REDUCE_SCATTER, GATHER_PARAMETERS)

"""Defines the operations by which the ranks of a replica put together a tensor of which each has
received a part."""

from __future__ import annotations

from meshwright.program.operations import OF_ROWS, Op

GATHER_F = Op(
    "GATHER_F", "collective", "receive", "transfers",
    blocks=True, reads=Op.RECV_F, meets=OF_ROWS,
)  # fmt: skip
"""Put activations together of which each tensor rank of a replica has received a part."""
GATHER_B = Op(
    "GATHER_B", "collective", "receive", "transfers",
    blocks=True, reads=Op.RECV_B, meets=OF_ROWS,
)  # fmt: skip
"""Put the gradients of a cut together in the same way."""

OPERATIONS = (GATHER_F, GATHER_B)
GATHERS = {Op.RECV_F: GATHER_F, Op.RECV_B: GATHER_B}
"""The gather that completes a receive of only a part."""

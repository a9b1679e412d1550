"""Lists the operations of a program in one table, with what schedules, prices, simulator, runtime
and reports must know about each.

The words are torch.distributed.pipelining's where it has one. Techniques add rows of their own in
their rooms; everything that can be decided from the fields of a row is decided from them, so that a
new operation needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal, Self

from pydantic_core import CoreSchema, core_schema

from meshwright.techniques import provided

Kind = Literal["compute", "send", "receive", "collective"]

Stream = Literal["compute", "send", "receive", "reduce"]
"""The tracks of one rank. Compute is serial; transfers overlap it and each other."""

Part = Literal["compute", "transfers", "reductions", "optimizer"]
"""The kind of time that an operation takes in the breakdown of a step."""

Reductions = Literal["none", "own", "all"]


class Op(str):
    """Names an operation by the word that stands for it in a program, and holds its properties.

    >>> Op.FORWARD, Op.FORWARD.kind, Op.FORWARD.reads
    ('F', 'compute', 'RECV_F')
    """

    kind: Kind
    """A collective is either posted (it returns at once) or blocks its rank."""
    stream: Stream
    part: Part
    blocks: bool
    """True if the rank issues nothing else until the other members of the collective have come."""
    reads: Op | None
    """The operation of the receives that it waits for, those of its stage and micro-batch."""
    awaits: Reductions
    """The posted collectives of this rank that it waits for: those of the same layers or tied
    parameter, or all."""
    completes_gradients: bool
    """True if it adds to gradients; the last such action of a stage completes them."""
    of_gradients: bool
    """True for a posted collective that starts, inside a backward, once its gradients are complete;
    others start when they are posted."""
    scatters: bool
    """True for a sum of gradients of which each member keeps an equal share."""
    meets: tuple[str, ...]
    """The fields of the instruction that are equal on all members of a collective, beside its
    ranks. Calls that are equal in all of them meet in the order of each rank's list."""
    ends_step: bool
    """True if it stands behind all backwards and transfers of the step."""
    named_by_layers: bool
    """True if its label in a timeline names the layers or the tied parameter."""

    FORWARD: ClassVar[Op]
    BACKWARD: ClassVar[Op]
    BACKWARD_INPUT: ClassVar[Op]
    BACKWARD_WEIGHT: ClassVar[Op]
    SEND_F: ClassVar[Op]
    RECV_F: ClassVar[Op]
    SEND_B: ClassVar[Op]
    RECV_B: ClassVar[Op]
    REDUCE_NORM: ClassVar[Op]
    OPTIMIZER_STEP: ClassVar[Op]

    def __new__(  # noqa: PLR0913 - one row of the table
        cls,
        word: str,
        kind: Kind,
        stream: Stream,
        part: Part,
        *,
        blocks: bool = False,
        reads: Op | None = None,
        awaits: Reductions = "none",
        completes_gradients: bool = False,
        of_gradients: bool = False,
        scatters: bool = False,
        meets: tuple[str, ...] = (),
        ends_step: bool = False,
        named_by_layers: bool = False,
    ) -> Self:
        """Makes one row of the table."""
        new = super().__new__(cls, word)
        new.kind, new.stream, new.part = kind, stream, part
        new.blocks, new.reads, new.awaits = blocks, reads, awaits
        new.completes_gradients = completes_gradients
        new.of_gradients, new.scatters = of_gradients, scatters
        new.meets, new.ends_step, new.named_by_layers = meets, ends_step, named_by_layers
        return new

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        """Copies an operation as its word, so that there is one of each."""
        return operation, (str(self),)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """Reads an operation from a file by its word."""
        return core_schema.no_info_after_validator_function(
            operation,
            core_schema.str_schema(max_length=64),
            serialization=core_schema.to_string_ser_schema(),
        )


OF_LAYERS = ("layers", "tied", "tile")
"""The fields that name the parameters which a collective is about."""
OF_ROWS = ("stage", "micro_batch", "rows")
"""The fields that name the rows of a micro-batch which a collective is about."""

Op.RECV_F = Op("RECV_F", "receive", "receive", "transfers")
"""Take the activations of a cut from the previous stage."""
Op.RECV_B = Op("RECV_B", "receive", "receive", "transfers")
"""Take the gradients of a cut from the next stage."""
Op.FORWARD = Op("F", "compute", "compute", "compute", reads=Op.RECV_F)
Op.BACKWARD = Op(
    "B", "compute", "compute", "compute", reads=Op.RECV_B, completes_gradients=True
)  # fmt: skip
Op.BACKWARD_INPUT = Op("I", "compute", "compute", "compute", reads=Op.RECV_B)
"""The first part of a backward, which the previous stage waits for: gradients of inputs."""
Op.BACKWARD_WEIGHT = Op("W", "compute", "compute", "compute", completes_gradients=True)
"""The rest of a backward: gradients of the stage's parameters."""
Op.SEND_F = Op("SEND_F", "send", "send", "transfers")
"""Hand the activations of a cut to the next stage."""
Op.SEND_B = Op("SEND_B", "send", "send", "transfers")
"""Hand the gradients of a cut to the previous stage."""
Op.REDUCE_NORM = Op(
    "REDUCE_NORM", "collective", "reduce", "reductions", blocks=True, awaits="all", ends_step=True
)
"""Sum the loss and the squared gradient norm over all ranks."""
Op.OPTIMIZER_STEP = Op(
    "OPTIMIZER_STEP", "compute", "compute", "optimizer",
    awaits="own", ends_step=True, named_by_layers=True,
)  # fmt: skip

_KERNEL = (
    Op.FORWARD,
    Op.BACKWARD,
    Op.BACKWARD_INPUT,
    Op.BACKWARD_WEIGHT,
    Op.SEND_F,
    Op.RECV_F,
    Op.SEND_B,
    Op.RECV_B,
    Op.REDUCE_NORM,
    Op.OPTIMIZER_STEP,
)


@cache
def operations() -> dict[str, Op]:
    """Returns all operations by their word, those of the techniques last."""
    added = (op for own in provided("operations", "OPERATIONS") for op in own)
    return {str(op): op for op in (*_KERNEL, *added)}


def operation(word: str) -> Op:
    """Returns the operation that a word stands for. Raises ValueError if there is none."""
    if word not in operations():
        raise ValueError(f"one of {', '.join(operations())}")
    return operations()[word]


@cache
def completing(receive: Op) -> tuple[Op, ...]:
    """Returns the collectives that put together the parts brought by receives of a kind."""
    found = operations().values()
    return tuple(op for op in found if op.stream == "receive" and op.reads == receive)


MATCHING_RECEIVE = {Op.SEND_F: Op.RECV_F, Op.SEND_B: Op.RECV_B}
"""The receive at the other end of a send."""

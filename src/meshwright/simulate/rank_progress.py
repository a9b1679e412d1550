"""Holds how far the ranks, messages and collectives of a simulated step have come."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshwright.cost.pricing_context import Price
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.program.operations import Op

At = tuple[int, int]
"""An instruction: its rank, and its index in that rank's list."""


@dataclass(slots=True, eq=False)
class RankProgress:
    """Keeps how far a rank has come, and what it waits for."""

    number: int
    instructions: Sequence[Instruction]
    prices: Sequence[Price]
    memory: float
    position: int = 0
    """The index of the next instruction."""
    busy: bool = False
    """True while it computes or a blocking collective holds it."""
    awaited: dict[tuple[Op, int, int | None], int] = field(default_factory=lambda: defaultdict(int))
    """The number of receives posted and not arrived, by RECV_F or RECV_B, stage and micro-batch."""
    posted: list[int] = field(default_factory=list)
    """The indices of the posted collectives, in order; those before `next_posted` have begun."""
    next_posted: int = 0
    open_reductions: Counter[GradientKey] = field(default_factory=Counter)
    """The number of sums of gradients posted and not finished, by what they sum."""


@dataclass(slots=True, eq=False)
class MessageChannel:
    """Holds the messages in one direction between two ranks, first in, first out."""

    source: RankProgress
    target: RankProgress
    sends: deque[int] = field(default_factory=deque)
    """The indices of the sends that have not begun; those of the receives follow."""
    receives: deque[int] = field(default_factory=deque)
    busy: bool = False


@dataclass(slots=True, eq=False)
class CollectiveProgress:
    """Holds the instructions that take part in one collective, and those that are ready for it."""

    members: list[At] = field(default_factory=list)
    ready: set[At] = field(default_factory=set)


@dataclass(slots=True)
class BroadcastQueue:
    """Holds the broadcasts along one chain, which run one after another."""

    ranks: tuple[int, ...]
    posted: dict[tuple[object, ...], list[At]] = field(default_factory=lambda: defaultdict(list))
    """The sends and receives of broadcasts that have not begun, by cut, micro-batch and rows."""
    busy: bool = False


def must_wait(state: RankProgress, i: Instruction) -> bool:
    """Returns whether a compute instruction or a collective of a rank must wait."""
    op = i.op
    if op.reads is not None and state.awaited[op.reads, i.stage, i.micro_batch]:
        return True
    if op.awaits == "own":
        return state.open_reductions[i.layers, i.tied] > 0
    return op.awaits == "all" and state.open_reductions.total() > 0

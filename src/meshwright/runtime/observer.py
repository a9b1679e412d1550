"""Functions that are called as a rank works, when time passes or other ranks may be waiting; they
may take time themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.model.spec import LayerGraph
from meshwright.program.instructions import Instruction

if TYPE_CHECKING:
    from meshwright.runtime.rank_model import RankModel

Waiting = Callable[[Callable[[], Any]], Any]
"""Function that calls its argument, which waits for other ranks, and returns the result."""


def _nothing(*_: object) -> None:
    pass


def _wait(wait: Callable[[], Any]) -> Any:
    return wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Holds functions that are called while a rank works; by default each does no more than its
    arguments ask for."""

    attach: Callable[[LayerGraph, RankModel], None] = _nothing
    """Called once, when the rank's layers have been built."""
    before: Callable[[Instruction], None] = _nothing
    """Called before an instruction computes."""
    after: Callable[[Instruction], None] = _nothing
    """Called when it has computed."""
    failed: Callable[[], object] = _nothing
    """Called in place of `after` if it has raised an exception."""
    between_layers: Callable[[], None] = _nothing
    """Called between two layers of an instruction, forwards and backwards."""
    posting: Callable[[], None] = _nothing
    """Called before an all-reduce starts, which other ranks may be waiting for."""
    waiting: Waiting = _wait
    """Called for a wait between two instructions' computing."""
    waiting_inside: Waiting = _wait
    """Called for a wait within an instruction's computing."""


UNOBSERVED = Observer()
"""Observes nothing."""

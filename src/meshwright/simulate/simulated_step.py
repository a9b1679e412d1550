"""Holds a simulated step, and writes its timeline only when one is asked for: a search simulates
many."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

from meshwright.cost.pricing import Prices
from meshwright.program.instructions import Program
from meshwright.program.timeline import MemoryPoint, Timeline, interval_of

Executed = tuple[int, int, float, float]
"""Rank, index, begin and end of an instruction."""


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """Holds when every instruction began and ended."""

    program: Program
    prices: Prices
    step_seconds: float
    executed: list[Executed]
    """What was carried out, in the order of the ends."""
    memory: list[tuple[int, float, float]]
    """The rank and the moment of every change of the memory in use, and the bytes from then on."""

    def in_order(self) -> list[Executed]:
        """Returns what was carried out in the order of the begins, and of ranks."""
        return sorted(sorted(self.executed, key=itemgetter(0)), key=itemgetter(2))

    def timeline(self) -> Timeline:
        """Returns the intervals of all instructions, and the memory in use."""
        prices = self.prices
        at_first = ((rank, 0.0, size) for rank, size in enumerate(prices.static_bytes))
        return Timeline(
            source="simulated",
            devices=prices.devices,
            step_seconds=self.step_seconds,
            intervals=tuple(
                interval_of(rank, self.program.ranks[rank][index], began, ended)
                for rank, index, began, ended in self.in_order()
            ),
            memory=tuple(
                MemoryPoint(rank=rank, seconds=seconds, bytes=round(size))
                for rank, seconds, size in (*at_first, *self.memory)
            ),
        )

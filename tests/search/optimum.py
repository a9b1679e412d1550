"""What CP-SAT (OR-Tools) proves about a pipeline: the oracle of the list scheduler."""

from __future__ import annotations

from itertools import product
from typing import Any

from ortools.sat.python import cp_model

from meshwright.program.work import Work

SCALE = 2
"""Bytes are halves."""


def least_seconds(work: Work, known: float, limit: float) -> tuple[float, bool]:
    """Seconds of the best order that the solver finds in `limit` seconds, `known` if it finds none
    that is faster, and whether that is proven to be the optimum.

    More may be done here than the program's rules allow (a transfer never waits for its receive to
    be posted), which makes the optimum no larger.
    """
    task = _Task(work, int(known))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = 1
    status = solver.Solve(task.model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN), status
    found = known if status == cp_model.UNKNOWN else float(solver.ObjectiveValue())
    return found, status == cp_model.OPTIMAL


class _Task:
    """F, I and W of every micro-batch on every stage; a whole backward is an I and a W at once."""

    def __init__(self, work: Work, horizon: int) -> None:
        self.work, self.horizon = work, horizon
        self.model = cp_model.CpModel()
        self.start: dict[tuple[str, int, int], Any] = {}
        self.split: dict[tuple[int, int], Any] = {}
        self.took = {"F": work.forward, "I": work.inputs, "W": work.weights}
        stages, count = len(work.forward), work.micro_batches
        for s, m in product(range(stages), range(count)):
            self.split[s, m] = self.model.NewBoolVar("")
            for kind, seconds in self.took.items():
                self.start[kind, s, m] = self.model.NewIntVar(0, horizon - int(seconds[s]), "")
        end = self.model.NewIntVar(0, horizon, "")
        for s in range(stages):
            self._one_at_a_time(s)
            self._memory(s)
            for m in range(count):
                self._order(s, m)
                self.model.Add(end >= self.ends("W", s, m))
        self.model.Minimize(end)

    def ends(self, kind: str, s: int, m: int) -> Any:
        return self.start[kind, s, m] + int(self.took[kind][s])

    def _one_at_a_time(self, s: int) -> None:
        own = [key for key in self.start if key[1] == s]
        self.model.AddNoOverlap(
            self.model.NewIntervalVar(
                self.start[key], int(self.took[key[0]][s]), self.ends(*key), ""
            )
            for key in own
        )

    def _order(self, s: int, m: int) -> None:
        model, work, start = self.model, self.work, self.start
        if m:  # micro-batches are alike
            for kind in self.took:
                model.Add(start[kind, s, m] >= self.ends(kind, s, m - 1))
        if s:
            model.Add(start["F", s, m] >= self.ends("F", s - 1, m) + int(work.onward[s - 1]))
        model.Add(start["I", s, m] >= self.ends("F", s, m))
        model.Add(start["W", s, m] >= self.ends("I", s, m))
        whole = self.split[s, m].Not()
        model.Add(start["W", s, m] == self.ends("I", s, m)).OnlyEnforceIf(whole)
        if s + 1 < len(work.forward):
            back = int(work.back[s])
            model.Add(start["I", s, m] >= self.ends("I", s + 1, m) + back)
            above = self.split[s + 1, m].Not()
            model.Add(start["I", s, m] >= self.ends("W", s + 1, m) + back).OnlyEnforceIf(above)

    def _memory(self, s: int) -> None:
        full, half, room = (
            SCALE * each for each in (self.work.full[s], self.work.half[s], self.work.room[s])
        )
        if room >= max(full, half) * self.work.micro_batches:
            return
        intervals, amounts = [], []
        for m in range(self.work.micro_batches):
            made, between, gone = (
                self.start["F", s, m],
                self.ends("I", s, m),
                self.ends("W", s, m),
            )
            size = [self.model.NewIntVar(0, self.horizon, "") for _ in range(3)]
            split = self.split[s, m]
            intervals += [
                self.model.NewIntervalVar(made, size[0], between, ""),
                self.model.NewOptionalIntervalVar(between, size[1], gone, split, ""),
                self.model.NewOptionalIntervalVar(between, size[2], gone, split.Not(), ""),
            ]
            amounts += [int(full), int(half), int(full)]
        self.model.AddCumulative(intervals, amounts, int(room))

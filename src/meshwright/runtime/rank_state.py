"""Lets other rooms read and write the weights and optimizer states of one rank, box by box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from meshwright.errors import Problem, TrainingError
from meshwright.layout.boxes import (
    Box,
    common,
    elements,
    inside,
    is_empty,
    lengths,
    run_of_elements,
    whole,
)
from meshwright.layout.tiles import Layout, holders_of, placed
from meshwright.plan.ranks import StagePlacement, stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction, Program
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.flat_buckets import TrainedPart
from meshwright.runtime.optimizer import Update
from meshwright.runtime.parameters import Parameter, layout_of, states_layout
from meshwright.runtime.rank_model import RankModel
from meshwright.runtime.slices import box_index
from meshwright.runtime.world import World

WEIGHT = "weight"
"""The kind of the weights themselves. Other kinds are the names that the optimizer gives to its
states, such as "exp_avg"."""


@dataclass
class RankState:
    """Reads and writes what training changes on one rank: weights and optimizer states, each by the
    name of its parameter, a kind and a box.

    Boxes are those of the whole parameter; a state that is one number for a whole parameter, such
    as a count of steps, has the box (). Raises TrainingError for a box that is not all on this
    rank.
    """

    plan: Plan
    program: Program
    own: RankModel
    updates: Iterable[Update]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Returns all parameters of the model, also those that other ranks hold."""
        return self.own.parameters

    @cached_property
    def _held(self) -> dict[str, LocalParameter]:
        return {one.name: one for one in self.own.local_parameters}

    @cached_property
    def _trained(self) -> dict[str, list[tuple[TrainedPart, Optimizer]]]:
        """Returns which parts of each parameter this rank updates, and by which optimizer."""
        found: dict[str, list[tuple[TrainedPart, Optimizer]]] = {}
        for update in self.updates:
            for part in (part for bucket in update.buckets for part in bucket.trained):
                assert update.optimizer is not None
                found.setdefault(part.of.name, []).append((part, update.optimizer))
        return found

    def layout(self, name: str, kind: str = WEIGHT) -> Layout:
        """Returns the boxes of a parameter, or of its optimizer states, that each rank holds. Of
        several ranks that hold a box, the first is the one to read it from."""
        parameter, stages = self.parameters[name], self._stages
        if kind == WEIGHT:
            return layout_of(parameter, stages)
        return states_layout(parameter, self.parameters.values(), stages, self._scattering)

    @cached_property
    def _stages(self) -> Sequence[StagePlacement]:
        return stage_placements(self.plan)

    @cached_property
    def _scattering(self) -> list[list[Instruction]]:
        return [[i for i in own if i.op.scatters] for own in self.program.ranks]

    def kinds(self, name: str) -> tuple[str, ...]:
        """Returns the kinds that this rank holds of a parameter; those of the optimizer begin with
        its first step."""
        found = {WEIGHT: None} if name in self._held else {}
        for each, optimizer in self._trained.get(name, ()):
            for kind, value in optimizer.state.get(each.parameter, {}).items():
                if isinstance(value, Tensor):
                    found[kind] = None
        return tuple(found)

    def pieces(self, name: str, kind: str = WEIGHT) -> Iterator[tuple[Box, Tensor]]:
        """Yields all boxes of a kind that this rank holds, each with a view of its elements."""
        if kind == WEIGHT:
            weight = self._held[name].parameter.detach()
            for box, place in placed(self._held[name].tile, whole(weight.shape)):
                yield box, weight[box_index(place)]
            return
        for each, optimizer in self._trained.get(name, ()):
            value = optimizer.state.get(each.parameter, {}).get(kind)
            if value is None:
                continue
            if value.shape == each.parameter.shape:
                yield from _boxes_of(each, value)
            elif value.dim() == 0:
                yield (), value
            else:
                found = f"a tensor of shape {tuple(value.shape)}"
                wanted = f"one number, or one for each element: {tuple(each.parameter.shape)}"
                raise TrainingError(Problem(f"optimizer state of {name}", kind, found, wanted))

    def read(self, name: str, box: Box, kind: str = WEIGHT) -> Tensor:
        """Returns a copy of a box."""
        views = self._views(name, box, kind)
        result = torch.empty(lengths(box), dtype=views[0][1].dtype, device=views[0][1].device)
        for place, view in views:
            result[box_index(place)].copy_(view)
        return result

    def write(self, name: str, box: Box, values: Tensor, kind: str = WEIGHT) -> None:
        """Copies values into a box. Optimizer states that do not exist yet are made, zero where
        nothing is written."""
        for each, optimizer in self._trained.get(name, ()) if kind != WEIGHT else ():
            if kind not in optimizer.state[each.parameter]:
                optimizer.state[each.parameter][kind] = _zeros(each, optimizer, box, values)
        for place, view in self._views(name, box, kind):
            view.copy_(values[box_index(place)])

    def _views(self, name: str, box: Box, kind: str) -> list[tuple[Box, Tensor]]:
        """Returns what this rank holds of a box: the place of each part inside the box, and a view
        of its elements."""
        found = []
        for piece, view in self.pieces(name, kind):
            both = common(piece, box)
            if not is_empty(both):
                found.append((inside(both, box), view[box_index(inside(both, piece))]))
        if not found or sum(elements(place) for place, _ in found) < elements(box):
            held = ", ".join(str(piece) for piece, _ in self.pieces(name, kind)) or "nothing"
            raise TrainingError(Problem(name, kind, held, f"all of {box} on this rank"))
        return found


def _boxes_of(part: TrainedPart, value: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """Yields the boxes of a state that has an element for each one of the weights it updates."""
    shape, start = part.of.parameter.shape, 0
    for local in run_of_elements(shape, *part.span):
        view = value
        if value.shape != shape:
            view = value[start : start + elements(local)].view(lengths(local))
        start += elements(local)
        for box, place in placed(part.of.tile, local):
            yield box, view[box_index(inside(place, local))]


def _zeros(part: TrainedPart, optimizer: Optimizer, box: Box, values: Tensor) -> Tensor:
    """Makes a state as the optimizer itself would: one number is on the CPU, except for optimizers
    that read it on the device."""
    if box or not part.of.of.shape:
        return torch.zeros_like(part.parameter, dtype=values.dtype)
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    device = part.parameter.device if on_device else torch.device("cpu")
    return torch.zeros((), dtype=values.dtype, device=device)


def collect_parameters(state: RankState, world: World) -> dict[str, Tensor] | None:
    """Collects whole parameters on the CPU of rank 0, box by box, each from the first rank that
    holds it; returns None on the other ranks."""
    result: dict[str, Tensor] = {}
    for name, parameter in state.parameters.items():
        result[name] = torch.empty(parameter.shape if world.rank == 0 else 0, dtype=parameter.dtype)
        for box, (holder, *_) in holders_of(state.layout(name)).items():
            if world.rank == holder == 0:
                result[name][box_index(box)] = state.read(name, box)
            elif world.rank == holder:
                dist.send(state.read(name, box), 0, group=world.forward)
            elif world.rank == 0:
                part = torch.empty(lengths(box), dtype=parameter.dtype, device=world.device)
                dist.recv(part, holder, group=world.forward)
                result[name][box_index(box)] = part
    return result if world.rank == 0 else None

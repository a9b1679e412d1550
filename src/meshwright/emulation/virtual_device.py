"""Emulates devices that do not compute: each layer takes its time from a table, while all tensors,
gradients and messages are real.

A layer computes once, to find the shapes of its results; after that it returns zeros of these
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.emulation.dilation import Dilation, Dilator, dilation_observer
from meshwright.emulation.virtual_times import RankTimes, part_key
from meshwright.model.spec import LayerGraph
from meshwright.program.instructions import Instruction, micro_batches_of
from meshwright.program.operations import Op
from meshwright.runtime.observer import Observer
from meshwright.runtime.optimizer import OptimizerFactory
from meshwright.runtime.rank_model import RankModel

Spend = Callable[[float], None]
"""Function that adds seconds to the emulated device's time."""

COMPUTE_IS_FREE = Dilation(share=float("inf"))
"""Computing takes no time of the device, only what is spent."""


class _Slept(Function):
    """Returns zeros in place of a layer's results, after spending its time; the gradients are zeros
    too."""

    @staticmethod
    def forward(ctx: Any, layer: VirtualLayer, made: tuple[Made, ...], *inputs: Tensor) -> Any:
        ctx.layer, ctx.inputs = layer, [(i.shape, i.dtype, i.requires_grad) for i in inputs]
        layer.spend(layer.forward_seconds)
        results = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype, _ in made)
        fixed = [r for r, (_, _, grad) in zip(results, made, strict=True) if not grad]
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        layer: VirtualLayer = ctx.layer
        if layer.pace.by_layer:
            layer.spend(layer.backward_seconds)
        gradients = (
            torch.zeros((), dtype=dtype).expand(shape) if grad else None
            for shape, dtype, grad in ctx.inputs
        )
        return None, None, *gradients


Made = tuple[torch.Size, torch.dtype, bool]
"""(Shape, dtype, True if it has a gradient) of one result."""


@dataclass
class BackwardState:
    """Tells the layers how the time of the running backward is spent: layer by layer, or as a
    whole."""

    by_layer: bool = True
    """False in a part of a split backward, whose time is spent as a whole."""


class VirtualLayer:
    """Replaces one layer's forward: it returns zeros, and takes the time that the layer would
    take."""

    def __init__(
        self,
        module: nn.Module,
        forward_seconds: float,
        backward_seconds: float,
        spend: Spend,
        pace: BackwardState,
    ) -> None:
        self.pace = pace
        self.forward_seconds = forward_seconds
        self.backward_seconds = backward_seconds
        self.spend = spend
        self._compute = module.forward
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._known: dict[tuple[torch.Size, ...], tuple[Made, ...]] = {}
        """The results of the layer, by the shapes of its inputs."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._known:
            real = self._compute(*inputs)
            self._known[key] = tuple((r.shape, r.dtype, r.requires_grad) for r in real)
        made: tuple[Tensor, ...] = _Slept.apply(  # type: ignore[no-untyped-call]
            self, self._known[key], *inputs, *self._parameters
        )
        return made


class VirtualOptimizer(torch.optim.Optimizer):
    """Takes as long as a real optimizer, and leaves the weights alone."""

    def __init__(self, parameters: Iterable[nn.Parameter], seconds: float, spend: Spend) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.seconds = seconds
        self.spend = spend

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Spends the time of one step."""
        self.spend(self.seconds)


@dataclass(frozen=True)
class VirtualDevice:
    """Holds what an Engine needs so that its compute instructions take their times from a table."""

    observer: Observer
    optimizer: OptimizerFactory


def virtual_device(times: RankTimes) -> VirtualDevice:
    """Makes a device that spends these times instead of computing."""
    clock, pace = Dilator(COMPUTE_IS_FREE), BackwardState()

    def attach(model: LayerGraph, own: RankModel) -> None:
        index = {layer.name: n for n, layer in enumerate(model.layers)}
        for part in (part for place in own.stages.values() for part in place.stage.parts):
            forward, backward = (each[index[part.name]] for each in (times.forward, times.backward))
            part.module.forward = VirtualLayer(part.module, forward, backward, clock.spend, pace)

    def before(i: Instruction) -> None:
        clock.begin()
        if i.op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
            pace.by_layer = False
            clock.spend(times.parts[part_key(i.stage, i.op, len(micro_batches_of(i)))])

    def after(_: Instruction) -> None:
        clock.end()
        pace.by_layer = True

    def optimizer(parameters: Iterable[nn.Parameter]) -> VirtualOptimizer:
        own = list(parameters)
        held = sum(parameter.numel() for parameter in own)
        seconds = times.optimizer + held * times.optimizer_per_parameter
        return VirtualOptimizer(own, seconds, clock.spend)

    observer = replace(dilation_observer(clock), attach=attach, before=before, after=after)
    return VirtualDevice(observer, optimizer)

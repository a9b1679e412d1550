"""Emulates devices that do not compute: each layer takes its time from a table, while all tensors,
gradients and messages are real.

A layer computes once, to find the shapes of its results; after that it returns zeros of these
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.program.operations import Op
from meshwright.runtime.dilation import Dilation
from meshwright.runtime.engine import Engine
from meshwright.runtime.stage import Stage
from meshwright.testbed.times import RankTimes, part_key

Spend = Callable[[float], None]
"""Function that adds seconds to the emulated device's time."""

PACE = Dilation(share=float("inf"))
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
class Pace:
    """State of the backward that is running."""

    by_layer: bool = True
    """False in a part of a split backward, whose time is spent as a whole."""


class VirtualLayer:
    """Replaces one layer's forward."""

    def __init__(
        self,
        module: nn.Module,
        forward_seconds: float,
        backward_seconds: float,
        spend: Spend,
        pace: Pace,
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
    """Takes an optimizer's time, and leaves the weights alone."""

    def __init__(self, parameters: Iterable[nn.Parameter], seconds: float) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.seconds = seconds
        self.spend: Spend = lambda _: None

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Spends the time of one step."""
        self.spend(self.seconds)


class VirtualEngine(Engine):
    """An Engine whose compute instructions take their times from a table."""

    def __init__(self, *arguments: Any, times: Sequence[RankTimes], **named: Any) -> None:
        def optimizer(parameters: Iterable[nn.Parameter]) -> VirtualOptimizer:
            return VirtualOptimizer(parameters, 0.0)

        super().__init__(*arguments, optimizer=optimizer, dilation=PACE, **named)
        assert self.dilator is not None
        own, spend, pace = times[self.rank], self.dilator.spend, Pace()
        for each in self._optimizers:
            assert isinstance(each, VirtualOptimizer)
            held = sum(p.numel() for group in each.param_groups for p in group["params"])
            each.seconds = own.optimizer + held * own.optimizer_per_parameter
            each.spend = spend
        index = {layer.name: n for n, layer in enumerate(self.model.layers)}
        for number, place in self._own.places.items():
            for part in place.stage.parts:
                n = index[part.name]
                virtual = VirtualLayer(part.module, own.forward[n], own.backward[n], spend, pace)
                part.module.forward = virtual
            _pace_parts(place.stage, number, own, spend, pace)


def _pace_parts(stage: Stage, number: int, own: RankTimes, spend: Spend, pace: Pace) -> None:
    """Makes each part of a split backward spend its time before it runs."""
    first, second = stage.backward_input, stage.backward_weight

    @contextmanager
    def timed(op: Op, micro_batches: int) -> Iterator[None]:
        pace.by_layer = False
        spend(own.parts[part_key(number, op, micro_batches)])
        yield
        pace.by_layer = True

    def inputs(micro_batch: int, gradients: Sequence[Tensor], weight: float) -> list[Tensor | None]:
        with timed(Op.BACKWARD_INPUT, 1):
            return first(micro_batch, gradients, weight)

    def weights(micro_batches: Sequence[int]) -> None:
        with timed(Op.BACKWARD_WEIGHT, len(micro_batches)):
            second(micro_batches)

    stage.backward_input = inputs  # type: ignore[method-assign]
    stage.backward_weight = weights  # type: ignore[method-assign]

"""Layers that take the time of a table, for PyTorch's own systems to train.

Their parameters, what they make and its gradients are real tensors of the real sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from meshwright.emulation.dilation import Dilator
from meshwright.model.graph import LayerPart


class Slept(Function):
    """Zeros in place of what a layer makes, after its time; and zeros for its gradients."""

    @staticmethod
    def forward(ctx: Any, layer: SleepingLayer, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.shapes = layer, [tensor.shape for tensor in inputs]
        layer.take(layer.forward_seconds)
        return tuple(torch.zeros(shape) for shape in layer.made)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        layer: SleepingLayer = ctx.layer
        layer.take(layer.backward_seconds)
        # What is handed to other ranks must be dense; autograd makes the rest so by itself.
        received = len(layer.reads)
        gradients = [torch.zeros(shape) for shape in ctx.shapes[:received]]
        gradients += [torch.zeros(()).expand(shape) for shape in ctx.shapes[received:]]
        return None, *gradients


class SleepingLayer(nn.Module):
    """One layer: its parameters, and the time that it takes."""

    def __init__(
        self,
        part: LayerPart,
        shapes: dict[str, tuple[int, ...]],
        seconds: tuple[float, float],
        device: Dilator,
    ) -> None:
        super().__init__()
        self.reads = [name for name in part.reads if name in shapes]
        self.writes = part.writes
        self.made = [shapes[name] for name in part.writes]
        self.forward_seconds, self.backward_seconds = seconds
        self.device = device
        for n, parameter in enumerate(part.module.parameters()):
            self.register_parameter(f"p{n}", nn.Parameter(torch.zeros(parameter.shape)))

    def take(self, seconds: float) -> None:
        """Lasts until the device has done so much more."""
        self.device.spend(seconds)
        self.device.catch_up()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = Slept.apply(self, *inputs, *self.parameters())
        return made


class SleepingStage(nn.Module):
    """Layers one after another; takes the tensors of its incoming cut, gives those of the next.

    Tensors for later stages go through it, since PyTorch's stages talk to their neighbours alone.
    """

    def __init__(self, layers: list[SleepingLayer], incoming: list[str], outgoing: list[str]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.incoming, self.outgoing = incoming, outgoing

    def forward(self, *received: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.incoming, received, strict=False))
        for layer in self.layers:
            made = layer(*(values[name] for name in layer.reads))
            values.update(zip(layer.writes, made, strict=True))
        return tuple(values[name] for name in self.outgoing)

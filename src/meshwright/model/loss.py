"""Joins a model and its loss into one module that returns the mean loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn


class WithLoss(nn.Module):
    """Computes forward(*inputs, target) = loss(model(*inputs), target), the mean over the rows.

    It shares the model's submodules and parameters under their own names, as if the loss were
    written at the end of the model's forward.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = dict(model._modules)
        self.loss = loss
        self.train(model.training)

    def forward(self, *batch: Tensor) -> Tensor:
        output = cast("nn.Module", self.model).forward(*batch[:-1])
        return cast("Tensor", self.loss(output, batch[-1]))

"""A model and its loss as one module, with the model's own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn


class WithLoss(nn.Module):
    """forward(*inputs, target) = loss(model(*inputs), target), the mean loss over the rows.

    Shares the model's submodules and parameters under their own names, as if the loss had been
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

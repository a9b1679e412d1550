"""The 16-bit copies of weights that products read: made once a step, not once a micro-batch.

Autocast makes a copy in every forward and keeps it for the backward: 2 bytes a parameter for each
micro-batch in flight. (Its own cache would share them, but then all gradients of weights wait for
the end of a backward: autograd runs the oldest operations last.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from meshwright.cluster.spec import Precision
from meshwright.model.symbolic import LOW_PRECISION, linear_parameters


class _Copy(Function):
    """A copy in low precision that exists already; its gradient in the weight's precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class Casts:
    """The copies of the weights and biases of every nn.Linear in some modules.

    Each takes its modules' parameters' place when the module is called, not earlier: in a backward
    the gradient of a copy is then cast as soon as it is there.
    """

    def __init__(self, modules: Sequence[nn.Module], precision: Precision) -> None:
        self._dtype = LOW_PRECISION.get(precision)
        self._copies: dict[int, Tensor] = {}
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        low = modules if self._dtype is not None else ()
        self._places: dict[nn.Module, list[str]] = {}
        for linear, name in (place for module in low for place in linear_parameters(module)):
            names = self._places.setdefault(linear, [])
            if name not in names:
                names.append(name)
        for linear in self._places:
            linear.register_forward_pre_hook(self._put)
            linear.register_forward_hook(self._restore, always_call=True)

    def tensors(self) -> list[Tensor]:
        """All copies, made if they are not there."""
        for module, names in self._places.items():
            for name in names:
                self._copy(module.get_parameter(name))
        return list(self._copies.values())

    def drop(self) -> None:
        """To be called before weights change."""
        self._copies.clear()

    def _copy(self, weight: nn.Parameter) -> Tensor:
        if id(weight) not in self._copies:
            self._copies[id(weight)] = weight.detach().to(self._dtype)
        return self._copies[id(weight)]

    def _put(self, module: nn.Module, _: object) -> None:
        for name in self._places[module]:
            weight = module.get_parameter(name)
            copy = _Copy.apply(weight, self._copy(weight))  # type: ignore[no-untyped-call]
            module._parameters[name] = copy
            self._replaced.append((module, name, weight))

    def _restore(self, *_: object) -> None:
        for module, name, weight in self._replaced:
            module._parameters[name] = weight
        self._replaced.clear()

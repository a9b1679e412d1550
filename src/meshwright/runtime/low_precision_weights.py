"""Casts weights to 16 bits once a step instead of once a micro-batch, and frozen weights once.

Autocast makes a copy in every forward and keeps it for the backward: 2 bytes per parameter for each
micro-batch in flight. (Its own cache would share the copies. But autograd runs the oldest
operations last, and the one shared cast is the oldest: all gradients of weights would wait for the
end of a backward.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from meshwright.cluster.spec import Precision
from meshwright.model.symbolic import LOW_PRECISION, linear_parameters


class CastWeight(Function):
    """Replaces a weight by its existing low-precision copy; the backward casts the gradient to the
    weight's precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class LowPrecisionWeights:
    """Keeps low-precision copies of the weights and biases of every nn.Linear in some modules.

    A copy takes the place of its parameter only while the module's forward runs: a backward then
    casts the gradient of a copy as soon as it has been computed.
    """

    def __init__(self, modules: Sequence[nn.Module], precision: Precision) -> None:
        self._dtype = LOW_PRECISION.get(precision)
        self._copies: dict[int, tuple[int, Tensor]] = {}
        """(Version of the weight that was copied, copy), keyed by the weight's identity."""
        self._frozen: set[int] = set()
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
        """Returns all copies, after making those that are missing."""
        for module, names in self._places.items():
            for name in names:
                self._copy(module.get_parameter(name))
        return [copy for _, copy in self._copies.values()]

    def drop(self) -> None:
        """Discards the copies of trainable weights; must be called before these change."""
        for each in self._copies.keys() - self._frozen:
            del self._copies[each]

    def _copy(self, weight: nn.Parameter) -> Tensor:
        known = self._copies.get(id(weight))
        if known is None or known[0] != weight._version:
            self._copies[id(weight)] = weight._version, weight.detach().to(self._dtype)
            if not weight.requires_grad:
                self._frozen.add(id(weight))
        return self._copies[id(weight)][1]

    def _put(self, module: nn.Module, _: object) -> None:
        for name in self._places[module]:
            weight = module.get_parameter(name)
            copy = CastWeight.apply(weight, self._copy(weight))  # type: ignore[no-untyped-call]
            module._parameters[name] = copy
            self._replaced.append((module, name, weight))

    def _restore(self, *_: object) -> None:
        for module, name, weight in self._replaced:
            module._parameters[name] = weight
        self._replaced.clear()

"""Products of an activation and a weight in two nodes of autograd, as a split backward needs them:
one makes the gradient of the activation, the other, later, that of the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class LinearProduct:
    """x W^T + b: both matrix products by hand, so that those of several micro-batches can join."""

    __slots__ = ("parameters", "parts", "weights")

    def __init__(self, weights: tuple[int, ...], parameters: tuple[Tensor, ...]) -> None:
        self.weights = weights
        """Identities of the parameters."""
        self.parameters = parameters
        """Weight and bias, if the product reads them as they are; else it has a token from the
        forward."""
        self.parts: list[tuple[Tensor, Tensor]] = []
        """Input and output gradient, once the first part of the backward has come by."""

    def join(self, other: LinearProduct) -> bool:
        """Takes over another micro-batch's part in the same gradients, if it can."""
        if self.weights != other.weights or not self.parts:
            return False
        self.parts += other.parts
        other.parts = []
        return True

    def ready(self) -> bool:
        """Whether anything came back to this product."""
        return bool(self.parts)

    def kept(self) -> Iterator[Tensor]:
        """What waits for the second part."""
        for part in self.parts:
            yield from part

    def gradients(self, needed: Sequence[bool]) -> Iterator[Tensor | None]:
        """Of weight and bias: dW = dy^T x and db = sum dy, over all rows of all parts."""
        ((x, dy),) = _joined(self._taken())
        yield dy.t().mm(x) if needed[0] else None
        if len(needed) > 1:
            yield dy.sum(0) if needed[1] else None

    def accumulate(self) -> None:
        """Adds both to the gradients of the parameters, where these lie."""
        weight, *bias = (cast("Tensor", p.grad) for p in self.parameters)
        parts = self._taken()
        # One product of all rows writes and reads them once more, every product the gradient.
        if sum(x.numel() + dy.numel() for x, dy in parts) < (len(parts) - 1) * weight.numel():
            parts = _joined(parts)
        for x, dy in parts:
            torch.addmm(weight, dy.t(), x, out=weight)
            for each in bias:
                each.add_(dy.sum(0))

    def _taken(self) -> list[tuple[Tensor, Tensor]]:
        flat = [(_rows(x), _rows(dy)) for x, dy in self.parts]
        self.parts = []
        return flat


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    if len(parts) == 1:
        return list(parts)
    x, dy = (torch.cat(both) for both in zip(*parts, strict=True))
    return [(x, dy)]


class OtherProduct:
    """Any other product, by autograd on a graph of its own."""

    __slots__ = ("edge", "gradient", "inner", "weights")

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights
        self.edge: GradientEdge | None = None
        self.inner: list[Tensor] = []
        """Stand-ins for the weights in the graph of its own."""
        self.gradient: Tensor | None = None

    def ready(self) -> bool:
        return self.gradient is not None

    def kept(self) -> Iterator[Tensor]:
        if self.gradient is not None:
            yield self.gradient

    def gradients(self, needed: Sequence[bool]) -> Iterator[Tensor | None]:
        assert self.edge is not None
        assert self.gradient is not None
        wanted = [w for w, want in zip(self.inner, needed, strict=True) if want]
        found = iter(torch.autograd.grad([self.edge], wanted, [self.gradient]))
        self.edge = self.gradient = None
        for want in needed:
            yield next(found) if want else None


Product = LinearProduct | OtherProduct


class Token(Function):
    """Stands for a product's weights: its backward makes their gradients."""

    @staticmethod
    def forward(ctx: Any, product: Product, *weights: Tensor) -> Tensor:
        ctx.product = product
        return torch.empty((), device=weights[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.product.gradients(ctx.needs_input_grad[1:])


class LinearInput(Function):
    """A linear product whose backward makes the gradient of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        product: LinearProduct,
        _: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x, weight)
        # Not the result itself: it can be a view, which what follows could not change in place.
        return F.linear(x, weight, bias).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.product.parts.append((x, grad))
        needed = ctx.needs_input_grad
        return None, None, grad @ weight if needed[2] else None, *(None for _ in needed[3:])


class OtherInput(Function):
    """Any product; its backward makes the gradients of its activations."""

    @staticmethod
    def forward(
        ctx: Any,
        product: OtherProduct,
        call: Callable[[Sequence[Tensor]], Tensor],
        _: Tensor,
        *activations: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        inner = [a.detach().requires_grad_(n) for a, n in zip(activations, needs, strict=True)]
        # Kept as they are, whatever becomes of what others keep: both parts read them.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            result = call(inner)
        product.edge = get_gradient_edge(result)
        ctx.product = product
        ctx.inner = inner
        # Not `detach`: a view could not be changed in place by what follows.
        return result.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: OtherProduct = ctx.product
        assert product.edge is not None
        product.gradient = grad
        wanted = [a for a in ctx.inner if a.requires_grad]
        found: Iterator[Tensor] = iter(())
        if wanted:
            edges = [product.edge]
            found = iter(torch.autograd.grad(edges, wanted, [grad], retain_graph=True))
        return None, None, None, *(next(found) if a.requires_grad else None for a in ctx.inner)


def _rows(tensor: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return tensor.reshape(-1, tensor.shape[-1])


def _same(tensor: Tensor) -> Tensor:
    return tensor

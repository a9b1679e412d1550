"""Divides each product of an activation and a weight into two autograd nodes, for a split backward.

One node computes the gradient of the activation; the other, later, that of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class LinearProduct:
    """Stands for the product x W^T + b. Its gradients are computed by hand, so that the weight
    gradients of several micro-batches can be one matrix product."""

    __slots__ = ("parameters", "parts", "weights")

    def __init__(self, weights: tuple[int, ...], parameters: tuple[Tensor, ...]) -> None:
        self.weights = weights
        """Identities of weight and bias."""
        self.parameters = parameters
        """Weight and bias themselves, if the product reads them unchanged; empty if it reads a form
        of them (a view, a cast), and has a token from the forward."""
        self.parts: list[tuple[Tensor, Tensor]] = []
        """(Input, output gradient) pairs, known after the first part of the backward."""

    def join(self, other: LinearProduct) -> bool:
        """Takes over another micro-batch's pairs for the same weights; returns False if that is not
        possible."""
        if self.weights != other.weights or not self.parts:
            return False
        self.parts += other.parts
        other.parts = []
        return True

    def ready(self) -> bool:
        """Returns True if a gradient has reached this product."""
        return bool(self.parts)

    def kept(self) -> Iterator[Tensor]:
        """Yields the tensors that are kept for the second part of the backward."""
        for part in self.parts:
            yield from part

    def gradients(self, needed: Sequence[bool]) -> Iterator[Tensor | None]:
        """Yields the gradients of weight and bias: dW = dy^T x and db = sum dy, over all rows of
        all parts."""
        ((x, dy),) = _joined(self._taken())
        yield dy.t().mm(x) if needed[0] else None
        if len(needed) > 1:
            yield dy.sum(0) if needed[1] else None

    def accumulate(self) -> None:
        """Adds both gradients to the `grad` of the parameters, in place."""
        weight, *bias = (cast("Tensor", p.grad) for p in self.parameters)
        parts = self._taken()
        # Joining rows writes and reads all of them once more; each product by itself writes and
        # reads the weight's gradient.
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
    """Stands for any other product; autograd differentiates it in a graph of its own."""

    __slots__ = ("edge", "gradient", "inner", "weights")

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights
        self.edge: GradientEdge | None = None
        self.inner: list[Tensor] = []
        """Detached weights, the leaves of that graph."""
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
"""A product whose weight gradient is computed later than its activation gradient."""


class WeightGradientNode(Function):
    """Stands for a product's weights in the autograd graph: its backward computes their
    gradients."""

    @staticmethod
    def forward(ctx: Any, product: Product, *weights: Tensor) -> Tensor:
        ctx.product = product
        return torch.empty((), device=weights[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.product.gradients(ctx.needs_input_grad[1:])


class InputGradientLinear(Function):
    """Computes a linear product; its backward computes the gradient of its input alone."""

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
        # `.data`, since the result can be a view, which later operations could not change in place.
        return F.linear(x, weight, bias).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.product.parts.append((x, grad))
        needed = ctx.needs_input_grad
        return None, None, grad @ weight if needed[2] else None, *(None for _ in needed[3:])


class InputGradientProduct(Function):
    """Computes any other product; its backward computes the gradients of its activations."""

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
        # Both parts read these saved tensors, so hooks that replace saved tensors must not act.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            result = call(inner)
        product.edge = get_gradient_edge(result)
        ctx.product = product
        ctx.inner = inner
        # Not `detach`, whose result is a view, which later operations could not change in place.
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
    """Merges all leading dimensions into one."""
    return tensor.reshape(-1, tensor.shape[-1])


def _same(tensor: Tensor) -> Tensor:
    return tensor

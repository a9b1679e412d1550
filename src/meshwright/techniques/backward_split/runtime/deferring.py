"""Splits a backward in two parts: first the gradients that the previous stage waits for, later
those of the weights.

The technique is that of 2BP (Rae et al. 2024) and zero bubble (Qi et al. 2023). While a forward
runs under `DeferWeightGradients`, every product of an activation and a weight becomes two autograd
nodes. One is in the graph of the activations: its backward computes the gradient of the activation
alone, and keeps what the other node needs. The other leads from a token to the weight; a backward
from the token computes the weight's gradient. (A linear product of unchanged parameters needs no
token: the product itself adds to their gradients, in one pass.) So each product is computed once,
accumulation and hooks work as usual, and the first part frees the graph: only inputs and output
gradients of the products are kept for the second. Parameters outside products (norms, added biases,
embeddings) get their gradients in the first part: their operations compute both at once, in
memory-bound kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from meshwright.runtime.low_precision_weights import CastWeight
from meshwright.techniques.backward_split.runtime.products import (
    InputGradientLinear,
    InputGradientProduct,
    LinearProduct,
    OtherProduct,
    Product,
    WeightGradientNode,
)

PRODUCTS: frozenset[Callable[..., Tensor]] = frozenset(
    {
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.bilinear,
        Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm,
        Tensor.__matmul__, Tensor.__rmatmul__,
    }
)  # fmt: skip
"""Operations besides `linear` whose weight gradients are worth deferring."""

_ALIASES = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "Expand", "Select",
                 "Slice", "Squeeze", "Unsqueeze", "Alias", "ToCopy")
) | {f"{CastWeight.__name__}Backward"}  # fmt: skip
"""Autograd nodes that may lie between a parameter and the form of it that a product reads."""


class DeferredGradients:
    """Holds the weight gradients of one micro-batch that its forward, under `DeferWeightGradients`,
    has put off."""

    def __init__(self) -> None:
        self.products: list[tuple[Tensor | None, Product]] = []
        """(Token, product) in the order of the forward; None for a product without a token."""

    def parameters(self) -> set[int]:
        """Returns the identities of the parameters whose gradients are deferred."""
        return {one for _, product in self.products for one in product.weights}

    def kept_bytes(self) -> int:
        """Returns the bytes of the tensors that the second part of the backward still needs."""
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for _, product in self.products
            for tensor in product.kept()
        }
        return sum(sizes.values())


class DeferWeightGradients(TorchFunctionMode):
    """Lets the forwards in its context defer the gradients of the weights in their products."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._weights = {id(p) for p in parameters if p.requires_grad}
        self._anchors: dict[torch.device, Tensor] = {}
        self.deferred = DeferredGradients()

    def begin(self) -> DeferredGradients:
        """Starts collecting the next forward's deferred gradients, and returns the collection."""
        self.deferred = DeferredGradients()
        return self.deferred

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **kwargs)
        if func in PRODUCTS and torch.is_grad_enabled():
            return self._any(func, args, kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        operands = (weight,) if bias is None else (weight, bias)
        low = _low_precision(input)
        if low is None and weight.ndim == 2 and all(id(w) in self._weights for w in operands):
            product = LinearProduct(tuple(map(id, operands)), operands)
            self.deferred.products.append((None, product))
            return self._product(product, input, operands)
        sources = tuple(parameter_behind(w, self._weights) for w in operands if w.requires_grad)
        if weight.ndim != 2 or not weight.requires_grad or None in sources:
            return F.linear(input, weight, bias)
        if low is not None:
            input, *operands = (t.to(low) for t in (input, *operands))  # type: ignore[assignment]
        product = LinearProduct(cast("tuple[int, ...]", sources), ())
        self._defer(product, operands)
        return self._product(product, input, operands)

    def _product(self, product: LinearProduct, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        fixed = (w.detach() for w in operands)
        anchor = self._anchor(x.device)
        return cast("Tensor", InputGradientLinear.apply(product, anchor, x, *fixed))  # type: ignore[no-untyped-call]

    def _any(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, kwargs)))
        weights = [
            t for t in tensors if t.requires_grad and parameter_behind(t, self._weights) is not None
        ]
        if not weights:
            return func(*args, **kwargs)
        product = OtherProduct(
            tuple(cast("int", parameter_behind(w, self._weights)) for w in weights)
        )
        product.inner = [w.detach().requires_grad_() for w in weights]
        self._defer(product, weights)
        fixed = {id(w): inner for w, inner in zip(weights, product.inner, strict=True)}
        activations = [t for t in tensors if id(t) not in fixed]

        def call(inner: Sequence[Tensor]) -> Any:
            by_identity = {id(a): b for a, b in zip(activations, inner, strict=True)} | fixed
            again, named = _replaced((args, kwargs), by_identity)
            return func(*again, **named)

        anchor = self._anchor(weights[0].device)
        return InputGradientProduct.apply(product, call, anchor, *activations)  # type: ignore[no-untyped-call]

    def _defer(self, product: Product, weights: Sequence[Tensor]) -> None:
        token = WeightGradientNode.apply(product, *weights)  # type: ignore[no-untyped-call]
        self.deferred.products.append((token, product))

    def _anchor(self, device: torch.device) -> Tensor:
        """Returns an empty tensor that makes the result of a product require a gradient even if its
        activations do not."""
        if device not in self._anchors:
            self._anchors[device] = torch.empty(0, device=device, requires_grad=True)
        return self._anchors[device]


def backward_weights(micro_batches: Sequence[DeferredGradients]) -> None:
    """Runs the second part of the backward of some micro-batches whose first part is done.

    Gradients accumulate, and hooks run, in the order of an ordinary backward. Linear products of
    the same weights over several micro-batches become one: dW = [dy_1; dy_2]^T [x_1; x_2].
    """
    ready = _ready(micro_batches)
    if _all_add_in_place(ready):
        _accumulate([cast("LinearProduct", product) for _, product in ready])
    else:
        tokens = [
            WeightGradientNode.apply(product, *cast("LinearProduct", product).parameters)  # type: ignore[no-untyped-call]
            if token is None
            else token
            for token, product in ready
        ]
        torch.autograd.backward(tokens)
    for deferred in micro_batches:
        deferred.products.clear()


def _ready(micro_batches: Sequence[DeferredGradients]) -> list[tuple[Tensor | None, Product]]:
    """Returns the products that a gradient has reached, with linear products joined where
    possible."""
    if len(micro_batches) == 1:
        return [each for each in micro_batches[0].products if each[1].ready()]
    found: list[tuple[Tensor | None, Product]] = []
    first: dict[tuple[tuple[int, ...], int], LinearProduct] = {}
    for deferred in micro_batches:
        seen: Counter[tuple[int, ...]] = Counter()
        for token, product in deferred.products:
            if not product.ready():
                continue
            if isinstance(product, LinearProduct):
                key = (product.weights, seen[product.weights])
                seen[product.weights] += 1
                if key in first and first[key].join(product):
                    continue
                first.setdefault(key, product)
            found.append((token, product))
    return found


def _all_add_in_place(ready: Sequence[tuple[Tensor | None, Product]]) -> bool:
    """Returns True if all gradients can be added in place: no product has a token, and no hook asks
    for a gradient before it is added."""
    for token, product in ready:
        if token is not None:
            return False
        for parameter in cast("LinearProduct", product).parameters:
            grad = parameter.grad
            if grad is None or grad.dtype != parameter.dtype or parameter._backward_hooks:
                return False
    return True


def _accumulate(products: Sequence[LinearProduct]) -> None:
    """Adds the gradients as a backward from tokens would, without a tensor for each gradient."""
    left = Counter(id(p) for product in products for p in product.parameters)
    with torch.no_grad():
        for product in reversed(products):
            product.accumulate()
            for parameter in product.parameters:
                left[id(parameter)] -= 1
                if not left[id(parameter)]:
                    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                        hook(parameter)


def parameter_behind(tensor: Tensor, known: set[int]) -> int | None:
    """Returns the identity of the parameter that `tensor` is a form of (itself, a view, a cast), if
    any."""
    if tensor.is_leaf:
        return id(tensor) if id(tensor) in known else None
    node: Node | None = tensor.grad_fn
    while node is not None and node.name() in _ALIASES:
        before = [each for each, _ in node.next_functions if each is not None]
        if len(before) != 1:
            return None
        node = before[0]
        parameter = getattr(node, "variable", None)
        if parameter is not None:
            return id(parameter) if id(parameter) in known else None
    return None


def _low_precision(tensor: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast would cast the operands of a product; None if it would
    not."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _replaced(value: Any, by_identity: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return by_identity[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(each, by_identity) for each in value)
    if isinstance(value, dict):
        return {key: _replaced(each, by_identity) for key, each in value.items()}
    return value

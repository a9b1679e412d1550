"""Counts what a forward and backward on fake tensors would cost: FLOPs, bytes moved, bytes alive.

Fused attention and RMS normalisation are counted as the kernels that accelerators have for them,
which save their inputs and one number per vector instead of every intermediate. Dropout in fused
attention is a part of the kernel and costs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

_ATEN = torch.ops.aten
_FLASH = _ATEN._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Counts the scores and their product with the values, not halved for a causal mask (as in
    torch): 2 * rows * heads * length * length_k * (head + head_v)."""
    return int(2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:  # noqa: ARG001
    """Counts five products (two in the forward), because the scores are computed again."""
    return int(2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3]))


for _op, _formula in ((_FLASH, _attention_flops), (_FLASH_BACKWARD, _attention_backward_flops)):
    if _op not in flop_registry:
        register_flop_formula(_op)(_formula)


class _FusedRMSNorm(torch.autograd.Function):
    """Moves and saves the same bytes as a fused RMS norm, without computing its values: it reads x,
    writes y, and saves x, the weight and one float32 per normalised vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return grads[0] * x, torch.empty_like(weight)


class DividedCrossEntropy(torch.autograd.Function):
    """Moves and saves the same bytes as the runtime's loss over a divided vocabulary, without its
    all-reduces: it saves the probabilities in full precision."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        x = logits.to(torch.promote_types(torch.float32, logits.dtype))
        x = x - x.amax(dim=1)[:, None]
        ctx.save_for_backward(x.exp_().div_(2), target)
        ctx.dtype = logits.dtype
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        softmax, _ = ctx.saved_tensors
        grad = softmax.clone()
        grad *= grads[0]
        return grad.to(ctx.dtype), None


class FusedKernels(TorchFunctionMode):
    """Replaces attention and RMS normalisation by the fused kernels of accelerators."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return func(*args[:4], **(kwargs | {"dropout_p": 0.0}))
        if func in (F.rms_norm, torch.rms_norm):
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            if weight is not None:
                return _FusedRMSNorm.apply(args[0], weight)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the cost of every operation that runs while this mode is active.

    Storages are numbered in the order of their allocation. `births` holds their sizes in bytes, and
    `events` the order of allocations and releases: n + 1 when storage n is allocated, -(n + 1) when
    it is freed. The same operations on another number of rows give the same events, so two runs
    separate bytes per row from constant bytes.
    """

    def __init__(self, weights: Any, cast_once: Any = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.attention_flops = 0
        self.unfused_flops = 0
        """The part of `attention_flops` that is in batches of products of two activations."""
        self.traffic = 0
        self.births: list[int] = []
        self.events: list[int] = []
        self.casts: set[int] = set()
        """Storages that hold the casts of weights which are cast once a step."""
        self._cast_once = _storages(cast_once).keys()
        self._weight_casts: set[int] = set()
        self._numbers: dict[int, int | None] = dict.fromkeys(_storages(weights))

    def numbers(self, values: Any) -> set[int]:
        """Gives the numbers of the storages behind some tensors, and numbers new ones. Storages of
        weights have no number."""
        result = set()
        for key, storage in _storages(values).items():
            if key not in self._numbers:
                number = len(self.births)
                self._numbers[key] = number
                self.births.append(storage.nbytes())
                self.events.append(number + 1)
                weakref.finalize(storage, self._end, key, number)
            if (known := self._numbers[key]) is not None:
                result.add(known)
        return result

    def _end(self, key: int, number: int) -> None:
        self.events.append(-number - 1)
        del self._numbers[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            if "attention" in func.name():
                self.attention_flops += flops
            elif packet is _ATEN.bmm and all(map(self._is_activation, args[:2])):
                self.attention_flops += flops
                self.unfused_flops += flops
            else:
                self.flops += flops
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        is_view = not func._schema.is_mutable and _storages(made).keys() & _storages(read).keys()
        if made and not is_view and "empty" not in func.name():
            self.traffic += sum(t.numel() * t.element_size() for t in (*read, *made))
        born = self.numbers(made)
        if packet is _ATEN._to_copy:
            if not self._is_activation(args[0]):
                self._weight_casts |= born
            if _storages(args).keys() & self._cast_once:
                self.casts |= born
        return out

    def _is_activation(self, tensor: Tensor) -> bool:
        """True if the tensor is neither a weight nor the cast of one."""
        numbers = [self._numbers.get(key) for key in _storages(tensor)]
        return all(n is not None and n not in self._weight_casts for n in numbers)
